"""What can go wrong for a user, each with the exit code that a launcher or a batch script sees."""

from __future__ import annotations


class ShardtuneError(Exception):
    """An error that a user can mend: shown without a traceback, then the process exits with `exit_code`."""

    exit_code = 1


class ConfigError(ShardtuneError):
    """The config or the command line is wrong, or the model does not exist or does not fit the task."""

    exit_code = 2


class DataError(ShardtuneError):
    """The data is wrong or missing; the message names file, line and field."""

    exit_code = 3


class CheckpointError(ShardtuneError):
    """A checkpoint is damaged or does not fit, and no older good one serves."""

    exit_code = 4


class NumbersError(ShardtuneError):
    """The loss or the gradients are not finite."""

    exit_code = 5


class RankError(ShardtuneError):
    """A rank died, or could not join the others."""

    exit_code = 6


class StorageError(ShardtuneError):
    """Storage is full or cannot be written."""

    exit_code = 7


class Stopped(ShardtuneError):
    """Stopped by a signal after saving; started again, the run goes on."""

    exit_code = 75


class FailedElsewhere(ShardtuneError):
    """Another rank failed and has said why; this one only leaves with the same code."""

    def __init__(self, exit_code: int) -> None:
        super().__init__(f"another rank failed with exit code {exit_code}")
        self.exit_code = exit_code
