"""Process groups that start at once: forked from one process of the test session that has all libraries in memory.

Importing them takes each rank five seconds and more, which in most tests is longer than what it does then. Tests of
launchers and of starting do without; so does a machine with GPUs, which a process can use only if none of its parents
has looked for them.
"""

from __future__ import annotations

import atexit
import json
import os
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path

from launching import free_port

TESTS = Path(__file__).parent
MANY = str(TESTS.parent / "trainer" / "shardtune" / "assemble" / "many.py")
"""The script that trains one config after the other."""
SERVER = TESTS / "ranks" / "forked.py"
COLD = any(Path("/dev").glob("nvidia[0-9]*"))
"""Whether groups are started with torchrun instead."""

_lock = threading.Lock()
_servers: list[subprocess.Popen[bytes]] = []


def run_group(
    words: Sequence[str | Path], ranks: int, log: Path, variables: Mapping[str, str] | None = None, seconds: float = 900
) -> int:
    """Runs a script, `words` with its arguments, on so many ranks of one thread each; they write to `log`.

    Returns the exit code of the first rank that failed, or 0. What takes longer than `seconds` is killed.
    """
    environment = {**os.environ, "OMP_NUM_THREADS": "1", **(variables or {})}
    if COLD or "TRITON_INTERPRET" in (variables or {}):  # read when Triton is imported
        return _cold(words, ranks, log, environment, seconds)
    codes = log.with_name(f"{log.name}.codes")
    codes.unlink(missing_ok=True)
    order = {
        "words": [str(word) for word in words],
        "ranks": ranks,
        "log": str(log),
        "codes": str(codes),
        "folder": os.getcwd(),
        "port": free_port(),
        "environment": environment,
    }
    leader = _ask(order)
    end = time.monotonic() + seconds
    while not codes.exists():
        if time.monotonic() > end:
            _kill(leader, log, seconds)
            return -signal.SIGKILL
        time.sleep(0.02)
    found = json.loads(codes.read_text(encoding="utf-8"))
    codes.unlink()
    return next((code for code in found if code), 0)


def _cold(words: Sequence[str | Path], ranks: int, log: Path, environment: dict[str, str], seconds: float) -> int:
    torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
    command = [sys.executable, *(torchrun if ranks > 1 else []), *map(str, words)]
    path = os.pathsep.join([str(TESTS), environment.get("PYTHONPATH", "")])
    with log.open("wb") as out:
        process = subprocess.Popen(
            command, env={**environment, "PYTHONPATH": path}, stdout=out, stderr=out, start_new_session=True
        )
        try:
            return process.wait(seconds)
        except subprocess.TimeoutExpired:
            _kill(process.pid, log, seconds)
            return process.wait()


def _kill(leader: int, log: Path, seconds: float) -> None:
    with suppress(ProcessLookupError):
        os.killpg(leader, signal.SIGKILL)
    with log.open("a", encoding="utf-8") as out:
        out.write(f"\nkilled after {seconds:.0f} seconds\n")


def _ask(order: dict) -> int:
    """The pid of the group's leader."""
    with _lock:
        if not _servers:
            _servers.append(_start())
        stdin, stdout = _servers[0].stdin, _servers[0].stdout
        assert stdin is not None
        assert stdout is not None
        stdin.write(json.dumps(order).encode() + b"\n")
        stdin.flush()
        return int(stdout.readline())


def _start() -> subprocess.Popen[bytes]:
    path = os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONPATH": path}
    server = subprocess.Popen(
        [sys.executable, str(SERVER)],
        stdin=subprocess.PIPE, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, env=environment,
        start_new_session=True,
    )  # fmt: skip
    atexit.register(_end, server)
    assert server.stdout is not None
    assert server.stdout.readline() == b"ready\n"
    return server


def _end(server: subprocess.Popen[bytes]) -> None:
    server.kill()
    server.communicate()
