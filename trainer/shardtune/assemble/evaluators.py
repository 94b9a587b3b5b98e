"""The evaluator that a config asks for."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from pathlib import Path

from shardtune.assemble.parts import judged_at_once, metric_names
from shardtune.config import Config
from shardtune.evaluation import Evaluator
from shardtune.metrics import Scorer
from shardtune.protocols import Generation, Strategy, Task
from shardtune.world import World


def make_evaluator(
    config: Config,
    task: Task,
    strategy: Strategy,
    world: World,
    labels: Sequence[str],
    folder: Path,
    told_to_stop: Callable[[], str | None],
) -> Evaluator:
    """`folder`: the run's; the other arguments as in `Evaluator`."""
    return Evaluator(
        task, strategy, world, Scorer(metric_names(config), labels), how_to_write(config),
        judged_at_once(config.batch), folder, told_to_stop,
    )  # fmt: skip


def how_to_write(config: Config) -> Generation:
    """The options of `evaluation` for texts."""
    options = config.evaluation
    return Generation(
        options.max_new_tokens,
        options.beams,
        min_new_tokens=options.min_new_tokens,
        length_penalty=options.length_penalty,
        no_repeat_ngram=options.no_repeat_ngram,
        temperature=options.temperature,
        top_k=options.top_k,
        top_p=options.top_p,
        stop=tuple(options.stop),
        seed=config.seed,
    )
