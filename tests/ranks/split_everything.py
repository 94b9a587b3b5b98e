"""Trains one config after the other, as shardtune.assemble.many, with every parameter split under ZeRO-3.

DeepSpeed keeps parameters of fewer than 100,000 elements whole on every rank, which all those of small models are.
"""

import sys

from shardtune.assemble.many import train_many
from shardtune.exit_codes import guarded
from shardtune.strategy.zero import Zero

plain_settings = Zero._settings


def settings(self: Zero) -> dict:
    made = plain_settings(self)
    made["zero_optimization"] |= {"stage3_param_persistence_threshold": 0, "stage3_model_persistence_threshold": 0}
    return made


Zero._settings = settings

if __name__ == "__main__":
    sys.exit(guarded(lambda: train_many(sys.argv[1:])))
