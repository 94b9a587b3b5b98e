"""Judges a model on a split: its loss, what it writes, and how that scores."""

from shardtune.evaluation.evaluator import Evaluator
from shardtune.evaluation.judged import AS_IT_IS, SPEEDS, Contender, Judged, Prediction, Split, Way

__all__ = ["AS_IT_IS", "SPEEDS", "Contender", "Evaluator", "Judged", "Prediction", "Split", "Way"]
