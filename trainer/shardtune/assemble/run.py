"""One training run, from a config to `final/`."""

from __future__ import annotations

import copy
import functools
import os
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import Any, cast

import torch

from shardtune import run_folder
from shardtune.assemble.earlier import take_over
from shardtune.assemble.isolation import check_isolation
from shardtune.assemble.optimizers import make_optimizer_recipe
from shardtune.assemble.parts import (
    DTYPES,
    check_device,
    choose_strategy,
    judged_at_once,
    make_strategy,
    metric_names,
)
from shardtune.assemble.prepared import Prepared, evaluated_splits, keep_tokenizer, prepare
from shardtune.assemble.resumable import config_of
from shardtune.assemble.resuming import FRESH, Beginning
from shardtune.assemble.saving import how_to_go_on, identify, restore, saved_weights, snapshots, state_of
from shardtune.assemble.steps import Course, make_course, make_stream, make_stream_course
from shardtune.assemble.stored import Stored, describe_stored, stored
from shardtune.assemble.trackers import make_trackers
from shardtune.assemble.tuned import Tuned, tuned_model
from shardtune.assemble.words import counted, device_name, facts, last_words
from shardtune.boundary import Boundaries
from shardtune.checkpoint.names import FOLDER
from shardtune.checkpoint.reading import Checkpoint
from shardtune.checkpoint.saver import Saver
from shardtune.config import Config
from shardtune.config_file import dump_config
from shardtune.data.corpus import Corpus
from shardtune.data.stream import Stream
from shardtune.devices import peak_flops
from shardtune.errors import NumbersError, ShardtuneError, StorageError
from shardtune.evaluation import Evaluator
from shardtune.flops import work_of
from shardtune.gradient_histograms import GradientHistograms
from shardtune.judging import Judge
from shardtune.loop import StepReport, train
from shardtune.optim.schedule import clip_scale, learning_rate, learning_rate_by_time
from shardtune.progress import Progress
from shardtune.protocols import Strategy
from shardtune.rank_figures import RankFigures
from shardtune.records import Records
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
    strategy = _placed(config, world, prepared, tuned, kind, saved)
    state = state_of(saved) if saved is not None else TrainingState()
    course, stream = _course(config, world, prepared, state.step)
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
        ends.enter_context(_taken(folder, config, world, prepared, beginning, environment))
        evaluator = Evaluator(
            prepared.task, strategy, world, metric_names(config), config.evaluation.max_new_tokens,
            config.evaluation.beams, judged_at_once(config.batch), folder / "predictions", stopping.told,
        )  # fmt: skip
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
        judge = Judge(
            evaluator, evaluated_splits(prepared, config.evaluation.examples), records, progress, state,
            course.total_steps, config.evaluation.every,
        )  # fmt: skip

        def after_step(report: StepReport) -> None:
            reporter.after_step(report)
            judge.where_due()

        progress.say(said)
        if saved is not None:
            ranks = f"{saved.ranks} rank{'s' * (saved.ranks > 1)} under {saved.state.get('strategy')}"
            origin = f"step {saved.step} of {saved.folder}, saved on {ranks}"
            progress.say("\n".join([f"goes on from {origin}", *(f"  {change}" for change in changes)]))
        if tuned.tuning.quantization is not None:
            progress.say(describe_stored([Stored(*rank) for rank in held]))
        saver = Saver(
            folder / FOLDER, world, config.checkpoint.keep, config.checkpoint.background,
            snapshots(config, world, state, in_loop, tuned, kind, identity, course.total_steps, beginning.began_from),
            progress.say,
        )  # fmt: skip
        boundaries = Boundaries(
            state, world, saver, config.checkpoint.every_steps, config.checkpoint.every_seconds,
            config.duration.seconds, stopping.told, lambda: how_to_go_on(folder, state, config.checkpoint.resume),
            begins_at=state.step if beginning.goes_on else 0,
        )  # fmt: skip
        if config.tracking.histograms is not None:
            in_loop = cast(Strategy, GradientHistograms(
                in_loop, trained, config.tracking.histograms, lambda: state.step, world, records.histograms
            ))  # fmt: skip
        rate_of = _rate(config, course)
        ends.callback(saver.close)
        ends.callback(course.steps.close)
        ends.enter_context(_kept_is_said(saver, world))
        begun = time.monotonic()
        stopping.training()
        if config.evaluation.baseline and course.total_steps != 0 and saved is None:
            judge.before_training()
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
        if not judge.after_training():
            boundaries.stop()
        for note in write_result(
            folder / "final", tuned.model, strategy, tuned.weights, prepared.tokenizer, prepared.labels,
            tuned.skeleton.stored_dtype, tuned.tuning, tuned.shapes, _updated(rate_of, state, course), world,
        ):  # fmt: skip
            progress.say(f"warning: {note}")
    world.first_does("written", lambda: None)  # nobody leaves before the result is there
    return last_words(folder, config, judge.before_and_after(), time.monotonic() - begun)


@contextmanager
def _taken(
    folder: Path, config: Config, world: World, prepared: Prepared, beginning: Beginning, environment: dict[str, Any]
) -> Iterator[None]:
    """The run's folder is made or written to, and no other run may write there meanwhile."""
    claims: list[int] = []

    def take() -> None:
        claims.append(beginning.claim(folder, dump_config(config), environment))
        keep_tokenizer(prepared, folder / run_folder.TOKENIZER)

    try:
        world.first_does("run's folder", take)
        yield
    finally:
        for claim in claims:
            os.close(claim)


@contextmanager
def _kept_is_said(saver: Saver, world: World) -> Iterator[None]:
    """What an error leaves: a checkpoint that was on its way to the disk becomes whole, where nobody is missing for
    that; and where the numbers or the storage went wrong, what is kept is said."""
    try:
        yield
    except Exception as error:
        if world.size == 1 or isinstance(error, NumbersError):  # which all ranks find
            with suppress(ShardtuneError):
                saver.finish()
        if isinstance(error, StorageError) and saver.kept() not in str(error):
            raise StorageError(f"{error}\n{saver.mending()}") from error
        if isinstance(error, NumbersError):
            raise NumbersError(f"{error}\n{saver.kept()}") from error
        raise


def _placed(
    config: Config, world: World, prepared: Prepared, tuned: Tuned, kind: str, saved: Checkpoint | None
) -> Strategy:
    """The strategy `kind` with the model and its values, in training mode."""
    model, dtype = tuned.model, DTYPES[config.model.dtype]
    weights = saved_weights(saved, model, tuned.weights) if saved is not None else tuned.weights
    strategy = make_strategy(kind, model, world, dtype, config.strategy.offload, config.strategy.nvme)
    strategy.prepare(model, weights, make_optimizer_recipe(config.optimizer, model, tuned.tuning))
    if config.data.batching == "packed":
        vocabulary = prepared.architecture.get_text_config().vocab_size
        check_isolation(prepared.task, strategy, vocabulary, world.device, dtype != torch.float32, config.model.path)
    model.train()
    return strategy


def _course(config: Config, world: World, prepared: Prepared, done: int) -> tuple[Course, Stream | None]:
    """The steps, of which so many are `done`, and the stream that they come from, if so."""
    if not config.data.streaming:
        table = prepared.tables["train"]
        return make_course(config, world, prepared.task, table, prepared.train_counts, done), None
    own_task = copy.deepcopy(prepared.task)  # a tokenizer's settings change while it is used: not in two threads
    stream = make_stream(config, own_task)
    return make_stream_course(config, world, own_task, stream, done), stream


def _rate(config: Config, course: Course) -> Callable[[TrainingState], float]:
    """The learning rate of the step that begins at a state."""
    peak, schedule, warmup = config.optimizer.lr, config.optimizer.schedule, config.optimizer.warmup
    total, limit = course.total_steps, config.duration.seconds
    if total is not None:
        return lambda state: learning_rate(state.step, total, peak, schedule, warmup)
    assert limit is not None
    return lambda state: learning_rate_by_time(state.step, state.seconds, limit, peak, schedule, warmup)


def _updated(rate_of: Callable[[TrainingState], float], state: TrainingState, course: Course) -> bool:
    """Whether there was a step with a learning rate above 0; by time the first one may have had none."""
    if course.total_steps is None:
        return state.step > 1
    return any(rate_of(TrainingState(step=step)) > 0 for step in range(state.step))
