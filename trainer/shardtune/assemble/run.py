"""One training run, from a config to `final/`."""

from __future__ import annotations

import copy
import functools
import os
import time
from collections.abc import Sequence
from pathlib import Path

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
from shardtune.assemble.prepared import evaluated_splits, prepare
from shardtune.assemble.steps import make_course, make_stream, make_stream_course
from shardtune.assemble.stored import Stored, describe_stored, stored
from shardtune.assemble.tuned import tuned_model
from shardtune.assemble.words import counted, device_name, facts, last_words
from shardtune.config import Config
from shardtune.config_file import dump_config
from shardtune.data.corpus import Corpus
from shardtune.errors import DataError, FailedElsewhere
from shardtune.evaluation import Evaluator
from shardtune.loop import train
from shardtune.optim.schedule import clip_scale, learning_rate
from shardtune.reporting import Reporter
from shardtune.result import write_result
from shardtune.state import TrainingState
from shardtune.stopping import Stopping
from shardtune.world import World


def train_run(
    config: Config, world: World, corpus: Corpus | None, command_line: Sequence[str], stopping: Stopping
) -> str:
    """Trains and writes the run's folder; `corpus` is given on the first rank. Returns what to say at the end.

    Raises ShardtuneError, each with its exit code.
    """
    folder = Path(config.runs) / config.name
    check_device(config, world)
    config = take_over(config)
    prepared = prepare(config, world, corpus)
    tuned = tuned_model(config, world, prepared)
    tuning, model, weights, dtype = tuned.tuning, tuned.model, tuned.weights, DTYPES[config.model.dtype]
    # One rank decides: cards may differ, and all must choose alike.
    kind = world.first_does("strategy", lambda: choose_strategy(config.strategy, model, world, dtype))
    said = facts(config, world, prepared, tuned, kind)
    strategy = make_strategy(kind, model, world, dtype, config.strategy.offload, config.strategy.nvme)
    strategy.prepare(model, weights, make_optimizer_recipe(config.optimizer, model, tuning))
    if config.data.batching == "packed":
        vocabulary = prepared.architecture.get_text_config().vocab_size
        check_isolation(prepared.task, strategy, vocabulary, world.device, dtype != torch.float32, config.model.path)
    model.train()
    world.seed_everything(config.seed)

    devices = world.gather(device_name(world.device))
    held = world.gather(list(stored(model)))
    claim = None
    if world.is_first:
        environment = run_folder.environment(list(command_line), kind, devices)
        environment["stored_bytes"] = [Stored(*rank)._asdict() for rank in held]
        claim = run_folder.begin(folder, dump_config(config), environment)
    state = TrainingState()
    stream = None
    if config.data.streaming:
        own_task = copy.deepcopy(prepared.task)  # a tokenizer's settings change while it is used: not in two threads
        stream = make_stream(config, own_task)
        steps, total_steps, examples_of = make_stream_course(config, world, own_task, stream)
    else:
        table = prepared.tables["train"]
        steps, total_steps, examples_of = make_course(config, world, prepared.task, table, prepared.train_counts)
    evaluator = Evaluator(
        prepared.task, strategy, world, metric_names(config), config.evaluation.max_new_tokens,
        config.evaluation.beams, judged_at_once(config.batch), folder / "predictions", stopping.told,
    )  # fmt: skip
    reporter = Reporter(
        folder, world, state, total_steps, examples_of, config.tracking.every, config.evaluation.every,
        config.tracking.tensorboard, evaluator, evaluated_splits(prepared, config.evaluation.examples),
        config.model_dump(mode="json"),
    )  # fmt: skip
    reporter.progress.say(said)
    if tuning.quantization is not None:
        reporter.progress.say(describe_stored([Stored(*rank) for rank in held]))
    rate_of = functools.partial(
        learning_rate, total_steps=total_steps, peak=config.optimizer.lr,
        schedule=config.optimizer.schedule, warmup=config.optimizer.warmup,
    )  # fmt: skip
    begun = time.monotonic()
    stopping.training()
    try:
        if config.evaluation.baseline and total_steps > 0:
            reporter.evaluate()
        train(
            state, total_steps, steps, *tuning.in_training(prepared.task, strategy, total_steps, world), world, rate_of,
            functools.partial(clip_scale, max_grad_norm=config.optimizer.max_grad_norm),
            reporter.after_step,
        )  # fmt: skip
        if stream is not None and stream.noted:
            reporter.progress.say(f"in the stream, as far as it was read: {counted(stream.noted)}")
        reporter.evaluate()
        updated = any(rate_of(step) > 0 for step in range(total_steps))
        for note in write_result(
            folder / "final", model, strategy, weights, prepared.tokenizer, prepared.labels,
            tuned.skeleton.stored_dtype, tuning, tuned.shapes, updated, world,
        ):  # fmt: skip
            reporter.progress.say(f"warning: {note}")
    except DataError as error:  # of a stream, which every rank reads, each perhaps from a file of its own
        if not world.first_to_say("stream"):
            raise FailedElsewhere(error.exit_code) from None
        raise DataError(
            f"{error}\nThis was found after {state.step} of {total_steps} steps. Their metrics and evaluations are in "
            f"{folder}; no weights were kept, as this version writes no checkpoints"
        ) from error
    finally:
        steps.close()
        reporter.close()
        if claim is not None:
            os.close(claim)
    world.first_does("written", lambda: None)  # nobody leaves before the result is there
    return last_words(folder, config, reporter.before_and_after(), time.monotonic() - begun)
