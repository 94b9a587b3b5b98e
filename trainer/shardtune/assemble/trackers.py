"""The trackers that a config asks for. Imports no torch, so that a missing package is told of at once."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable
from pathlib import Path

from shardtune.config import Config
from shardtune.errors import ConfigError, ShardtuneError
from shardtune.tracking.mlflow_tracker import MlflowTracker
from shardtune.tracking.sending import Sending
from shardtune.tracking.tensorboard_tracker import TensorBoardTracker
from shardtune.tracking.tracker import Tracker
from shardtune.tracking.wandb_tracker import WandbTracker
from shardtune.world import World

SERVICES: dict[str, Callable[[Path, bool], Tracker]] = {"wandb": WandbTracker, "mlflow": MlflowTracker}


def check_trackers(config: Config) -> None:
    """Raises ConfigError where the package of a tracker is missing."""
    missing = [name for name in _services(config) if importlib.util.find_spec(name) is None]
    if missing:
        keys = ", ".join(f"tracking.{name}" for name in missing)
        raise ConfigError(f"{keys}: not installed here; pip install 'shardtune[track]'")


def make_trackers(
    config: Config, folder: Path, world: World, after: int | None, say: Callable[[str], None]
) -> list[Tracker]:
    """Those that the config asks for, started, on the first rank; the others wait for it, and have none.

    `after`: the step that a run goes on after; `say`: is told what goes wrong with a service later. Raises ConfigError
    where a service cannot be used, before the first step of a run; one that goes on does so without it, and says that.
    """
    trackers: list[Tracker] = []
    world.first_does("trackers", lambda: trackers.extend(_started(config, folder, after, say)))
    return trackers


def _started(config: Config, folder: Path, after: int | None, say: Callable[[str], None]) -> list[Tracker]:
    trackers: list[Tracker] = []
    values = config.model_dump(mode="json")
    if config.tracking.tensorboard:
        trackers.append(TensorBoardTracker(folder / "tensorboard", after))
        trackers[-1].start(values)
    for name in _services(config):
        tracker = Sending(SERVICES[name](folder, after is not None), name, say)
        try:
            tracker.start(values)
        except Exception as error:
            said = str(error) if isinstance(error, ShardtuneError) else f"tracking.{name}: cannot be used: {error}"
            if after is None:
                raise ConfigError(said) from error
            say(f"warning: {said}; the run goes on without it")
        else:
            trackers.append(tracker)
    return trackers


def _services(config: Config) -> list[str]:
    return [name for name in SERVICES if getattr(config.tracking, name)]
