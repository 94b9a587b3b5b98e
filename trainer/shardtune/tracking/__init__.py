"""Where the figures of a run go: metrics.jsonl, and trackers such as TensorBoard behind one interface."""

from shardtune.tracking.metrics_file import MetricsFile
from shardtune.tracking.tensorboard_tracker import TensorBoardTracker
from shardtune.tracking.tracker import Histogram, Tracker

__all__ = ["Histogram", "MetricsFile", "TensorBoardTracker", "Tracker"]
