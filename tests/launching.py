"""Runs a command line as a user would, and sees what it cost, which modules it imported and whom it left behind."""

from __future__ import annotations

import os
import resource
import socket
import subprocess
import sys
import time
import uuid
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

REPOSITORY = Path(__file__).resolve().parent.parent
BIN = Path(sys.executable).parent
LAUNCHERS = ("python", "torchrun", "deepspeed", "shardtune")
MARK = "SHARDTUNE_TEST_MARK"
"""An environment variable that every process of a launch inherits."""


@dataclass
class Finished:
    """A command that has ended."""

    code: int
    out: str
    err: str
    """Standard error, without the lines of the interpreter's import log."""
    modules: frozenset[str]
    """What was imported by Python, by all of its processes."""
    seconds: float
    cpu_seconds: float
    """User time of the command and of the processes it waited for."""
    left: list[int]
    """Processes that were still there one second after its end."""

    @property
    def said(self) -> str:
        """Both streams, for a failure's message."""
        return f"exit {self.code}, {self.seconds:.1f} s, {self.cpu_seconds:.1f} s of CPU\n{self.out}\n{self.err}"


def command(launcher: str, ranks: int, *arguments: str | Path) -> list[str]:
    """The command line that trains on `ranks` ranks of this machine."""
    script = [str(REPOSITORY / "launch" / "train.py")]
    start = {
        "python": [sys.executable, *script],
        "torchrun": [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(ranks), *script],
        "deepspeed": [
            str(BIN / "deepspeed"), "--num_gpus", str(ranks), "--master_port", str(free_port()), *script,
        ],
        "shardtune": [str(BIN / "shardtune"), "train", "--ranks", str(ranks)],
    }[launcher]  # fmt: skip
    assert launcher != "python" or ranks == 1
    return [*start, *map(str, arguments)]


def environment(cache: Path) -> dict[str, str]:
    """What a launch is started with: this venv first on PATH, one thread a rank, nothing of an outer launcher."""
    outer = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
    kept = {name: value for name, value in os.environ.items() if name not in outer}
    return {
        **kept,
        "PATH": f"{BIN}:{os.environ.get('PATH', '')}",
        "SHARDTUNE_CACHE": str(cache),
        "OMP_NUM_THREADS": "1",
        "HF_HUB_OFFLINE": "1",
        "CUDA_VISIBLE_DEVICES": "",  # two ranks would not find two GPUs on most machines
        MARK: uuid.uuid4().hex,
    }


def run(
    words: Sequence[str],
    cache: Path,
    *,
    imports: bool = False,
    timeout: float = 240,
    variables: Mapping[str, str] | None = None,
) -> Finished:
    """Runs a command to its end; `imports`: also notes what it imports."""
    settings = {**environment(cache), **(variables or {})}
    if imports:
        settings["PYTHONPROFILEIMPORTTIME"] = "1"
    spent, begun = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime, time.perf_counter()
    done = subprocess.run(
        words, env=settings, cwd=REPOSITORY, timeout=timeout, capture_output=True, text=True, check=False
    )
    seconds = time.perf_counter() - begun
    cpu_seconds = resource.getrusage(resource.RUSAGE_CHILDREN).ru_utime - spent
    lines = done.stderr.splitlines()
    logged = [line for line in lines if line.startswith("import time:")]
    return Finished(
        done.returncode,
        done.stdout,
        "\n".join(line for line in lines if not line.startswith("import time:")),
        frozenset(line.rpartition("|")[2].strip() for line in logged),
        seconds,
        cpu_seconds,
        _until_gone(settings[MARK], 1.0),
    )


@contextmanager
def started(words: Sequence[str], cache: Path, output: Path) -> Iterator[subprocess.Popen[bytes]]:
    """A command that goes on while the body runs, its output in a file; in the end nothing of it is left."""
    settings = environment(cache)
    with output.open("wb") as stream:
        process = subprocess.Popen(words, env=settings, cwd=REPOSITORY, stdout=stream, stderr=stream)
    process.mark = settings[MARK]  # type: ignore[attr-defined]
    try:
        yield process
    finally:
        for pid in marked(settings[MARK]):
            with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
                os.kill(pid, 9)
        process.wait()


def wait_for(condition, seconds: float) -> bool:
    """Waits until `condition()` is true; false where it is not within `seconds`."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            return False
        time.sleep(0.05)
    return True


def marked(mark: str) -> list[int]:
    """The living processes that have `mark` in their environment."""
    wanted, found = f"{MARK}={mark}".encode(), []
    for entry in Path("/proc").glob("[0-9]*"):
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if wanted in (entry / "environ").read_bytes().split(b"\0"):
                found.append(int(entry.name))
    return found


def ranks_of(mark: str) -> dict[int, int]:
    """The process of each rank; those that ranks have started have the variables of theirs, too."""
    ranks, parents = {}, {}
    for pid in marked(mark):
        with suppress(FileNotFoundError, ProcessLookupError):
            variables = Path(f"/proc/{pid}/environ").read_bytes().split(b"\0")
            parents[pid] = int(Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[1])
            ranks[pid] = next((int(v[len("RANK=") :]) for v in variables if v.startswith(b"RANK=")), None)
    return {rank: pid for pid, rank in ranks.items() if rank is not None and ranks.get(parents[pid]) is None}


def free_port() -> int:
    """A TCP port that nobody listens on."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _until_gone(mark: str, seconds: float) -> list[int]:
    wait_for(lambda: not marked(mark), seconds)
    return marked(mark)
