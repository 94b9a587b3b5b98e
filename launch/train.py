"""The entry that deepspeed, torchrun and python start: one process, one rank."""

import sys

from shardtune.cli import train_as_rank
from shardtune.exit_codes import leave

if __name__ == "__main__":
    leave(train_as_rank(sys.argv[1:]))
