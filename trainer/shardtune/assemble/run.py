"""One training run, from a config to `final/`."""

from __future__ import annotations

import functools
import sys
import time
from collections.abc import Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import cast

from shardtune import run_folder
from shardtune.assemble.contenders import contenders
from shardtune.assemble.earlier import take_over
from shardtune.assemble.evaluators import make_evaluator
from shardtune.assemble.judged import judge_result, make_judge, write_comparison
from shardtune.assemble.parts import (
    DTYPES,
    check_device,
    choose_strategy,
)
from shardtune.assemble.placed import placed
from shardtune.assemble.prepared import evaluated_splits, prepare
from shardtune.assemble.resumable import config_of
from shardtune.assemble.resuming import FRESH, Beginning, taken
from shardtune.assemble.saving import how_to_go_on, identify, kept_is_said, restore, snapshots, state_of
from shardtune.assemble.steps import course_of, rate_for, was_updated
from shardtune.assemble.stored import Stored, describe_stored, stored
from shardtune.assemble.trackers import make_trackers
from shardtune.assemble.tuned import tuned_model
from shardtune.assemble.words import counted, device_name, facts, goes_on_from, last_words
from shardtune.before_after import before_and_after
from shardtune.boundary import Boundaries
from shardtune.checkpoint.names import FOLDER
from shardtune.checkpoint.saver import Saver
from shardtune.config import Config
from shardtune.data.corpus import Corpus
from shardtune.devices import peak_flops
from shardtune.flops import work_of
from shardtune.gradient_histograms import GradientHistograms
from shardtune.loop import StepReport, train
from shardtune.optim.schedule import clip_scale
from shardtune.progress import Progress
from shardtune.protocols import Strategy
from shardtune.rank_figures import RankFigures
from shardtune.records import Records
from shardtune.report import write_report
from shardtune.reporting import Reporter
from shardtune.result import write_result
from shardtune.state import TrainingState
from shardtune.stopping import Stopping
from shardtune.strategy.parameters import trained_parameters
from shardtune.world import World


def train_run(
    config: Config,
    world: World,
    corpus: Corpus | None,
    command_line: Sequence[str],
    stopping: Stopping,
    beginning: Beginning = FRESH,
) -> str:
    """Trains and writes the run's folder; `corpus` is given on the first rank. Returns what to say at the end.

    Raises ShardtuneError, each with its exit code.
    """
    folder, saved = Path(config.runs) / config.name, beginning.saved
    check_device(config, world)
    resumed = config_of(saved.state).tuning.model_dump(mode="json") if saved is not None else None
    config = take_over(config, resumed)
    prepared = prepare(config, world, corpus)
    identity = identify(config, prepared, world)
    changes = beginning.check(config, identity, world)
    tuned = tuned_model(config, world, prepared, saved)
    # One rank decides: cards may differ, and all must choose alike.
    dtype = DTYPES[config.model.dtype]
    kind = world.first_does("strategy", lambda: choose_strategy(config.strategy, tuned.model, world, dtype))
    said, work = facts(config, world, prepared, tuned, kind), work_of(tuned.model)
    trained = [name for name, _ in trained_parameters(tuned.model)]
    strategy = placed(config, world, prepared, tuned, kind, saved)
    state = state_of(saved) if saved is not None else TrainingState()
    course, stream = course_of(config, world, prepared, state.step)
    task, in_loop = tuned.tuning.in_training(prepared.task, strategy, course.total_steps or 0, world)
    if saved is None:
        world.seed_everything(config.seed)
    else:
        restore(saved, in_loop, world, config.seed)

    devices, held = world.gather(device_name(world.device)), world.gather(list(stored(tuned.model)))
    environment = run_folder.environment(list(command_line), kind, devices) if world.is_first else {}
    environment["fused"] = tuned.fused
    environment["stored_bytes"] = [Stored(*rank)._asdict() for rank in held]
    with ExitStack() as ends:
        ends.enter_context(taken(folder, config, world, prepared, beginning, environment))
        evaluator = make_evaluator(config, prepared.task, strategy, world, prepared.labels, folder, stopping.told)
        after = state.step if beginning.goes_on else None
        if after is not None:
            world.first_does("predictions", lambda: evaluator.forget_after(after))
        progress = Progress(
            course.total_steps, state.step, world.is_first, config.tracking.every, limit=config.duration.seconds
        )
        ends.callback(progress.close)
        trackers = make_trackers(config, folder, world, after, progress.say)
        records = ends.enter_context(Records(folder, world, trackers, after))
        telling = RankFigures(world, strategy.in_step, records.joules)
        reporter = Reporter(
            records, progress, world.device, state, course.total_steps, course.examples_of, config.tracking.every,
            telling, work, [peak_flops(name, config.model.dtype) for name in devices],
        )  # fmt: skip
        splits = evaluated_splits(prepared, config.evaluation.examples)
        judge = make_judge(config, folder, world, evaluator, splits, records, progress, state, course.total_steps)

        def after_step(report: StepReport) -> None:
            reporter.after_step(report)
            judge.where_due()

        progress.say(said)
        if saved is not None:
            progress.say(goes_on_from(saved, changes))
        if tuned.tuning.quantization is not None:
            progress.say(describe_stored([Stored(*rank) for rank in held]))
        saver = Saver(
            folder / FOLDER, world, config.checkpoint.keep, config.checkpoint.background,
            snapshots(config, world, state, in_loop, tuned, kind, identity, course.total_steps, beginning.began_from),
            progress.say, judge.best_until,
        )  # fmt: skip
        boundaries = Boundaries(
            state, world, saver, config.checkpoint.every_steps, config.checkpoint.every_seconds,
            config.duration.seconds, stopping.told, lambda: how_to_go_on(folder, state, config.checkpoint.resume),
            begins_at=state.step if beginning.goes_on else 0, is_best=judge.is_best, is_enough=judge.is_enough,
        )  # fmt: skip
        if config.tracking.histograms is not None:
            in_loop = cast(Strategy, GradientHistograms(
                in_loop, trained, config.tracking.histograms, lambda: state.step, world, records.histograms
            ))  # fmt: skip
        rate_of = rate_for(config, course)
        ends.callback(saver.close)
        ends.callback(course.steps.close)
        ends.enter_context(kept_is_said(saver, world))
        begun = time.monotonic()
        stopping.training()
        if config.evaluation.baseline and saved is None:
            judge.before_training(contenders(config, prepared, evaluator, world))
        judge.where_due()
        train(
            state, sys.maxsize if course.total_steps is None else course.total_steps, course.steps, task, in_loop,
            world, rate_of, functools.partial(clip_scale, max_grad_norm=config.optimizer.max_grad_norm),
            boundaries, telling, after_step,
        )  # fmt: skip
        boundaries.end()
        if stream is not None and stream.noted:
            progress.say(f"in the stream, as far as it was read: {counted(stream.noted)}")
        reporter.after_training()
        chosen = judge_result(config, folder, world, judge, boundaries, in_loop, tuned.shapes, state, progress.say)
        comparison = world.first_does(
            "comparison", lambda: write_comparison(config, folder, judge, splits, prepared.labels, chosen, state.step)
        )
        for note in write_result(
            folder / "final", tuned.model, strategy, tuned.weights, prepared.tokenizer, prepared.labels,
            tuned.skeleton.stored_dtype, tuned.tuning, tuned.shapes, was_updated(rate_of, state, course), world,
        ):  # fmt: skip
            progress.say(f"warning: {note}")
    note = world.first_does("report", lambda: write_report(folder))  # nobody leaves before all is there
    return last_words(folder, config, before_and_after(comparison), note, time.monotonic() - begun)
