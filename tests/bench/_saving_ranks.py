"""One rank of `saving.py`: every way of saving in turn, each timed from a barrier on, by the slower rank."""

from __future__ import annotations

import json
import mmap
import os
import shutil
import sys
import time
import warnings
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp

from shardtune.checkpoint.saver import Saver, Snapshot
from shardtune.protocols import VALUE, Piece
from shardtune.world import World, join_world

TENSOR_BYTES = 64 << 20
CHUNK = 16 << 20
WARMING_SECONDS = 10.0
SETTLING_SECONDS = 0.5
Tensors = dict[str, torch.Tensor]


class Watch:
    """Seconds since the ranks last met; the slowest rank's count."""

    def __init__(self, world: World) -> None:
        self._world = world
        dist.barrier()
        self._begun = time.perf_counter()

    def read(self) -> float:
        spent = torch.tensor([time.perf_counter() - self._begun], dtype=torch.float64)
        return float(self._world.largest(spent))


def main() -> None:
    warnings.simplefilter("ignore")
    settings = json.loads(sys.argv[1])
    world = join_world()
    torch.manual_seed(world.rank)
    count = max(1, int(settings["gib"] * 2**30 / world.size / TENSOR_BYTES))
    tensors = {f"rank{world.rank}.layer{i}": torch.randn(TENSOR_BYTES // 4) for i in range(count)}
    folder = Path(settings["folder"]) / "saved"

    first_stop = {}
    for name, boundaries in (("in_a_run", 2), ("nothing_before", 0)):
        with saver(tensors, folder, world) as ours:
            for _ in range(boundaries):
                ours.agreed([0.0, 0.0, 0.0])
            time.sleep(WARMING_SECONDS if boundaries else 0.0)
            first_stop[name] = round(in_background(ours, world)["stop"], 3)
        clear(folder, world)

    with saver(tensors, folder, world) as ours:
        own_group = dist.new_group()  # it uses it from a thread, while the benchmark uses the other one
        plain, copy = plain_write(tensors, folder, world), plain_copy(tensors, world)
        sides: dict[str, Callable[[], dict[str, float]]] = {
            "copy": copy,
            "ours": lambda: in_background(ours, world),
            "disk": plain,
            "ours_hurried": lambda: hurried(ours, world),
            "dcp_sync": lambda: dcp_sync(tensors, folder, world),
            "dcp_async": lambda: dcp_async(tensors, folder, world, own_group),
            "torch_save": lambda: torch_save(tensors, folder, world),
        }
        found: dict[str, list[dict[str, float]]] = {name: [] for name in sides}
        for number in range(-1, settings["rounds"]):  # the first round warms up
            for name, side in list(sides.items())[:: 1 if number % 2 else -1]:
                clear(folder, world)
                time.sleep(SETTLING_SECONDS)  # a disk that allows bursts is slower after the side before
                seconds = side()
                if number >= 0:
                    found[name].append(seconds)
                if world.is_first:
                    print(f"bench: round {number + 1}, {name}: {seconds}", file=sys.stderr)
    clear(folder, world)
    if world.is_first:
        Path(settings["out"]).write_text(json.dumps({"sides": found, "first_stop": first_stop}), encoding="utf-8")
    dist.destroy_process_group()


def clear(folder: Path, world: World) -> None:
    """Nothing of the side before is left."""
    if world.is_first:
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    dist.barrier()


@contextmanager
def saver(tensors: Tensors, folder: Path, world: World) -> Iterator[Saver]:
    pieces = [Piece(name, VALUE, tuple(value.shape), 0, value) for name, value in tensors.items()]
    made = Saver(folder / "checkpoints", world, 1, True, lambda: Snapshot(1, pieces, {"step": 1}, ""), lambda _: None)
    try:
        yield made
    finally:
        made.close()


def in_background(ours: Saver, world: World) -> dict[str, float]:
    watch = Watch(world)
    ours.save()
    stop = watch.read()
    ours.finish()
    return {"stop": stop, "whole": watch.read()}


def hurried(ours: Saver, world: World) -> dict[str, float]:
    watch = Watch(world)
    ours.save(hurried=True)
    return {"whole": watch.read()}


def plain_write(tensors: Tensors, folder: Path, world: World) -> Callable[[], dict[str, float]]:
    """The same bytes past the page cache, from memory that is there."""
    size = sum(value.nbytes for value in tensors.values())
    memory = mmap.mmap(-1, size)
    image = torch.frombuffer(memory, dtype=torch.float32)
    image.copy_(torch.cat(list(tensors.values())))

    def write() -> dict[str, float]:
        watch = Watch(world)
        descriptor = os.open(folder / f"plain-{world.rank}", os.O_WRONLY | os.O_CREAT | os.O_DIRECT)
        with memoryview(memory) as data:
            for at in range(0, size, CHUNK):
                os.pwrite(descriptor, data[at : at + CHUNK], at)
        os.fsync(descriptor)
        os.close(descriptor)
        return {"whole": watch.read()}

    return write


def plain_copy(tensors: Tensors, world: World) -> Callable[[], dict[str, float]]:
    """One copy in memory, to where something was copied before."""
    there = [value.clone() for value in tensors.values()]

    def copy() -> dict[str, float]:
        watch = Watch(world)
        for to, value in zip(there, tensors.values(), strict=True):
            to.copy_(value)
        return {"whole": watch.read()}

    return copy


def dcp_sync(tensors: Tensors, folder: Path, world: World) -> dict[str, float]:
    watch = Watch(world)
    dcp.save(dict(tensors), storage_writer=dcp.FileSystemWriter(folder / "dcp"))
    return {"stop": watch.read(), "whole": watch.read()}


def dcp_async(tensors: Tensors, folder: Path, world: World, group: dist.ProcessGroup) -> dict[str, float]:
    watch = Watch(world)
    writer = dcp.FileSystemWriter(folder / "dcp")
    done = dcp.async_save(dict(tensors), storage_writer=writer, process_group=group)
    stop = watch.read()
    done.result()
    return {"stop": stop, "whole": watch.read()}


def torch_save(tensors: Tensors, folder: Path, world: World) -> dict[str, float]:
    watch = Watch(world)
    with open(folder / f"rank-{world.rank}.pt", "wb") as file:
        torch.save(tensors, file)
        file.flush()
        os.fsync(file.fileno())
    return {"stop": watch.read(), "whole": watch.read()}


if __name__ == "__main__":
    main()
