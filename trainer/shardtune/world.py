"""The ranks of a run: who this one is, its device, and the few collectives that the rest needs.

The only file that reads the variables that launchers set.
"""

from __future__ import annotations

import hashlib
import json
import os
import random
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any

from shardtune.errors import ConfigError, FailedElsewhere, RankError, ShardtuneError

if TYPE_CHECKING:  # torch takes seconds to import, and errors in the config or the data come before it
    import torch
    import torch.distributed as dist

POLL_SECONDS = 0.1
READERS_SECONDS = 10.0
LAUNCHER = "SHARDTUNE_LAUNCHER"
"""The variable in which `shardtune train` tells its ranks which process it is."""
SILENCE_LIMIT = timedelta(minutes=30)


@dataclass
class World:
    """This process among the ranks of a run."""

    rank: int
    size: int
    local_rank: int
    device: torch.device
    store: dist.Store | None = None
    """Key-value store shared by the ranks; None on one rank."""
    _done: int = 0

    @property
    def is_first(self) -> bool:
        """Whether this rank speaks, scores and writes."""
        return self.rank == 0

    def sum(self, values: list[float]) -> list[float]:
        """Each value summed over all ranks, in float64."""
        if self.size == 1:
            return values
        import torch
        import torch.distributed as dist

        tensor = torch.tensor(values, dtype=torch.float64)
        dist.all_reduce(tensor)
        return tensor.tolist()

    def largest(self, values: torch.Tensor) -> torch.Tensor:
        """The elementwise maximum over all ranks, in the place of `values`, which is on the rank's device."""
        import torch.distributed as dist

        if self.size > 1:
            dist.all_reduce(values, op=dist.ReduceOp.MAX)
        return values

    def send(self, values: torch.Tensor, owner: int) -> torch.Tensor:
        """Those of rank `owner`, in the place of `values`, which has the same shape and dtype on every rank."""
        import torch.distributed as dist

        if self.size > 1:
            dist.broadcast(values, owner)
        return values

    def gather(self, value: Any) -> list[Any]:
        """The JSON-like value of every rank in rank order, on the first rank; an empty list elsewhere."""
        if self.size == 1:
            return [value]
        import torch
        import torch.distributed as dist

        # JSON over tensors: nothing that comes from another process is unpickled.
        data = torch.frombuffer(bytearray(json.dumps(value).encode()), dtype=torch.uint8)
        sizes = [torch.zeros(1, dtype=torch.int64) for _ in range(self.size)]
        dist.all_gather(sizes, torch.tensor([data.numel()]))
        longest = max(int(size) for size in sizes)
        padded = torch.nn.functional.pad(data, (0, longest - data.numel()))
        received = [torch.empty(longest, dtype=torch.uint8) for _ in range(self.size)] if self.is_first else None
        dist.gather(padded, received)
        if received is None:
            return []
        return [json.loads(r[: int(n)].numpy().tobytes()) for r, n in zip(received, sizes, strict=True)]

    def first_does(self, name: str, work: Callable[[], Any]) -> Any:
        """Runs `work` on the first rank and gives every rank its JSON-like result; `name` says what it is.

        All ranks call it in the same order. The others wait without a collective, however long it takes; if it fails,
        they raise FailedElsewhere.
        """
        if self.store is None:
            return work()
        self._done += 1
        key = f"{self._done}/{name}"
        if self.is_first:
            try:
                result = work()
            except BaseException as error:
                code = error.exit_code if isinstance(error, ShardtuneError) else 1
                self.store.set(key, json.dumps({"failed": code}))
                self._wait_for_readers(key)
                raise
            self.store.set(key, json.dumps({"result": result}))
            return result
        while not self.store.check([key]):
            time.sleep(POLL_SECONDS)
        answer = json.loads(self.store.get(key))
        if "failed" in answer:
            self.store.add(f"{key}/read", 1)
            raise FailedElsewhere(answer["failed"])
        return answer["result"]

    def first_to_say(self, name: str) -> bool:
        """Whether no other rank has asked this before, for a message that one of them should print."""
        return self.store is None or self.store.add(f"said/{name}", 1) == 1

    def _wait_for_readers(self, key: str) -> None:
        """The store may live in this process: it must not end before the others know why."""
        assert self.store is not None
        deadline = time.monotonic() + READERS_SECONDS
        while self.store.add(f"{key}/read", 0) < self.size - 1 and time.monotonic() < deadline:
            time.sleep(POLL_SECONDS)

    @contextmanager
    def others_may_end(self) -> Iterator[None]:
        """Turns a collective that failed because another rank has ended into a RankError: the cause is told there."""
        import torch.distributed as dist

        try:
            yield
        except RuntimeError as error:  # gloo's has no class of its own
            lost = isinstance(error, dist.DistNetworkError | dist.DistStoreError | dist.DistBackendError) or any(
                sign in str(error) for sign in ("Connection closed by peer", "Connection reset by peer", "Broken pipe")
            )
            if self.size > 1 and lost:
                raise RankError(f"rank {self.rank}: another rank has ended; its own message says why") from None
            raise

    def seed_everything(self, seed: int, step: int = 0) -> None:
        """Seeds the random streams of this rank from `step` on (dropout differs between ranks, weights do not use
        these)."""
        import numpy as np
        import torch

        own = int.from_bytes(hashlib.sha256(f"{seed} {step} {self.rank}".encode()).digest()[:7], "big")
        random.seed(own)
        np.random.seed(own % 2**32)
        torch.manual_seed(own)

    def close(self) -> None:
        """Leaves the process group, once all others are here too: the store may live in this process."""
        import torch.distributed as dist

        with suppress(RuntimeError):  # the others were here, and have left
            self.sum([0.0])
        if dist.is_initialized():
            dist.destroy_process_group()


def rank_environment(rank: int, size: int, local_rank: int, local_size: int, address: str, port: int) -> dict[str, str]:
    """The variables that tell a process which rank it is, as torchrun sets them."""
    return {
        "RANK": str(rank),
        "WORLD_SIZE": str(size),
        "LOCAL_RANK": str(local_rank),
        "LOCAL_WORLD_SIZE": str(local_size),
        "MASTER_ADDR": address,
        "MASTER_PORT": str(port),
    }


def launched_ranks() -> int | None:
    """How many ranks a launcher has started, or None if this process was started alone."""
    return int(os.environ["WORLD_SIZE"]) if "RANK" in os.environ and "WORLD_SIZE" in os.environ else None


def launched_rank() -> int:
    """The rank that a launcher gave this process; 0 if it was started alone."""
    return int(os.environ.get("RANK", 0))


def launched_local_rank() -> int:
    """Which of this machine's ranks the process is."""
    return int(os.environ.get("LOCAL_RANK", 0))


def launched_by() -> int | None:
    """The process that has started this rank, where its launcher is ours; others do not say."""
    return int(os.environ[LAUNCHER]) if LAUNCHER in os.environ else None


def check_launcher() -> None:
    """Refuses processes that were started together but do not know each other: they would overwrite one folder.

    Raises ConfigError.
    """
    tasks = int(os.environ.get("SLURM_STEP_NUM_TASKS", 1)) if "SLURM_PROCID" in os.environ else 1
    if tasks > 1 and launched_ranks() is None:
        raise ConfigError(
            f"srun has started {tasks} processes that do not know each other; use slurm/train.sbatch, or one task a "
            "node with torchrun in it"
        )


def join_world() -> World:
    """Joins the ranks that the launcher has started; alone, a world of one.

    Raises RankError where the others cannot be reached, ConfigError where a rank finds no GPU left for it.
    """
    import torch
    import torch.distributed as dist

    size, rank = launched_ranks() or 1, launched_rank()
    local_rank = launched_local_rank()
    if torch.cuda.is_available() and local_rank >= torch.cuda.device_count():
        raise ConfigError(f"{torch.cuda.device_count()} GPUs here are too few for rank {rank}; start a rank for each")
    device = torch.device("cuda", local_rank) if torch.cuda.is_available() else torch.device("cpu")
    if device.type == "cuda":
        torch.cuda.set_device(device)
    elif "OMP_NUM_THREADS" not in os.environ:
        # Ranks that each take all cores would fight for them; launchers differ in what they do about it.
        here = int(os.environ.get("LOCAL_WORLD_SIZE", size))
        torch.set_num_threads(max(1, len(os.sched_getaffinity(0)) // here))
    backend = "cpu:gloo,cuda:nccl" if device.type == "cuda" else "gloo"
    if size == 1:  # FSDP2 and DeepSpeed want a group even then; it needs no port
        os.environ.setdefault("LOCAL_RANK", "0")  # DeepSpeed insists on it
        dist.init_process_group(backend, store=dist.HashStore(), rank=0, world_size=1)
        return World(0, 1, local_rank, device)
    try:
        store, rank, size = next(dist.rendezvous("env://", timeout=timedelta(minutes=5)))
        store.set_timeout(SILENCE_LIMIT)
        dist.init_process_group(
            backend,
            store=dist.PrefixStore("collectives", store),
            rank=rank,
            world_size=size,
            timeout=SILENCE_LIMIT,
            device_id=device if device.type == "cuda" else None,
        )
    except (RuntimeError, ValueError) as error:
        hint = ""
        if "EADDRINUSE" in str(error):
            hint = "\nAnother run on this machine has that port: give the launcher another one with --master_port"
        raise RankError(f"rank {rank} of {size} could not join the others: {error}{hint}") from error
    return World(rank, size, local_rank, device, dist.PrefixStore("shardtune", store))
