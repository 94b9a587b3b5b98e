"""How a command ends: what a user can mend is said in a few lines, without a traceback, and has an exit code."""

from __future__ import annotations

import errno
import io
import logging
import os
import sys
import time
from collections.abc import Callable
from typing import TYPE_CHECKING, NoReturn

from shardtune.errors import (
    ConfigError,
    FailedElsewhere,
    NumbersError,
    RankError,
    ShardtuneError,
    Stopped,
    StorageError,
)
from shardtune.world import launched_local_rank, launched_rank, launched_ranks

if TYPE_CHECKING:
    from typing_extensions import Buffer

FOUND_BY_ALL = (ConfigError, NumbersError)
"""Errors that every rank of a machine runs into; one of them says it."""
SPEAKING_SECONDS = 2.0
"""How long the others wait while one rank says what is wrong."""
SPINS = "30000"
"""How often a thread of GNU OpenMP looks for work before it sleeps. With its own 300,000, a step took 35 times longer
beside other programs on all cores; with fewer than 5,000, a step alone is slower."""
STORAGE_ERRORS = {errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EACCES, errno.EPERM}
UNHEARD = {errno.EPIPE, errno.EIO}
"""The other end of a pipe, or of a terminal, is gone."""


class _StandardError(io.FileIO):
    """Goes on when nobody listens any more: Control-C also ends the `tee` behind a run that is still to be saved."""

    def write(self, data: Buffer) -> int:
        try:
            return super().write(data)
        except OSError as error:
            if error.errno not in UNHEARD:
                raise
            return memoryview(data).nbytes


def guarded(work: Callable[[], int]) -> int:
    """Runs `work` and returns its exit code; what a user can mend is said in a few lines, without a traceback."""
    os.environ.setdefault("GOMP_SPINCOUNT", SPINS)  # read when torch is imported
    if sys.stderr is sys.__stderr__ and sys.stderr is not None:
        raw = io.BufferedWriter(_StandardError(sys.stderr.fileno(), "w", closefd=False))
        sys.stderr = io.TextIOWrapper(raw, sys.stderr.encoding, sys.stderr.errors, line_buffering=True)
    log = logging.getLogger("shardtune")
    if not log.handlers:
        log.addHandler(logging.StreamHandler())  # plain lines on standard error
        log.setLevel(logging.INFO)
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # on import it says which kernels it does without
    try:
        return work()
    except FailedElsewhere as error:
        return _leave_second(error)
    except Stopped as error:
        if launched_rank() == 0:
            print(f"shardtune: stopped (exit code {error.exit_code})\n{error}", file=sys.stderr, flush=True)
        return error.exit_code
    except ShardtuneError as error:
        return _failed(error)
    except KeyboardInterrupt:
        if launched_local_rank() == 0:
            print("shardtune: interrupted", file=sys.stderr)
        return 130
    except OSError as error:
        if error.errno in STORAGE_ERRORS:
            return _failed(StorageError(f"{error.filename or 'storage'}: {error.strerror}"))
        raise


def leave(code: int) -> NoReturn:
    """Ends the process with an exit code.

    One of several ranks ends at once: threads of the collectives may still release tensors, which fails in the middle
    of the interpreter's own end ("terminate called without an active exception") and would take the code's place.
    """
    if (launched_ranks() or 1) > 1 and code != RankError.exit_code:  # that one lets the launcher name the rank first
        logging.shutdown()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    sys.exit(code)


def _failed(error: ShardtuneError) -> int:
    if launched_local_rank() > 0 and isinstance(error, FOUND_BY_ALL):
        return _leave_second(error)
    # torchrun turns every failure into 1, so the code is also said.
    who = f" on rank {launched_rank()}" if launched_rank() > 0 else ""
    print(f"shardtune: error (exit code {error.exit_code}){who}\n{error}", file=sys.stderr, flush=True)
    return error.exit_code


def _leave_second(error: ShardtuneError) -> int:
    """A rank that has nothing to say: the first to leave makes the launcher end the others, who may still speak."""
    time.sleep(SPEAKING_SECONDS)
    return error.exit_code
