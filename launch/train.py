"""The entry that deepspeed, torchrun and python start: one process, one rank."""

import sys

from shardtune.cli import train_as_rank

if __name__ == "__main__":
    sys.exit(train_as_rank(sys.argv[1:]))
