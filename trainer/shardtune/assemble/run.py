"""One training run, from a config to `final/`."""

from __future__ import annotations

import copy
import functools
import logging
import os
import sys
import time
import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
import transformers
from torch import nn
from transformers import PreTrainedConfig, PreTrainedTokenizerBase

from shardtune import bottleneck, run_folder
from shardtune.assemble.begin_with import begin_with
from shardtune.assemble.earlier import folder_of, take_over
from shardtune.assemble.eva import observe_inputs
from shardtune.assemble.isolation import check_isolation
from shardtune.assemble.optimizers import make_optimizer_recipe
from shardtune.assemble.parts import (
    DTYPES,
    check_device,
    choose_strategy,
    is_chat,
    judged_at_once,
    make_strategy,
    make_task,
    metric_names,
    of_tasks,
    saved_labels,
    task_notes,
)
from shardtune.assemble.positions import check_positions, longest_row
from shardtune.assemble.steps import describe_sources, make_course, make_stream, make_stream_course
from shardtune.assemble.stored import Stored, describe_stored, stored
from shardtune.assemble.tunings import make_tuning
from shardtune.config import Config
from shardtune.config_file import dump_config
from shardtune.conversations import contents
from shardtune.data.corpus import Corpus
from shardtune.data.tables import TokenTable, cache_folder, fingerprint, open_table, write_table
from shardtune.errors import ConfigError, DataError, FailedElsewhere
from shardtune.evaluation import Evaluator, Split
from shardtune.loop import train
from shardtune.model.dropout import quicken_dropout
from shardtune.model.packed_attention import keep_apart
from shardtune.model.quantized import quantize_layers
from shardtune.model.quantized_weights import QuantizedWeights
from shardtune.model.skeleton import Skeleton, build_skeleton, load_architecture, set_dropout
from shardtune.model.tokenizer import fit_config, identity, load_tokenizer, train_tokenizer
from shardtune.optim.schedule import clip_scale, learning_rate
from shardtune.protocols import Task, Text
from shardtune.reporting import Reporter
from shardtune.result import write_result
from shardtune.state import TrainingState
from shardtune.task.chat import Chat
from shardtune.task.chat_template import set_template
from shardtune.tuning.eva import Eva
from shardtune.world import World

ENCODED_AT_ONCE = 4096
"""Texts handed to the tokenizer together; it spreads them over the processor's cores."""


@dataclass
class Prepared:
    """What every rank knows before the weights are loaded."""

    architecture: PreTrainedConfig
    tokenizer: PreTrainedTokenizerBase
    task: Task
    labels: list[str]
    tables: dict[str, TokenTable]
    train_counts: list[int]
    """How many training examples are from each source."""
    corpus: Corpus | None
    """What is known of the texts, on the first rank."""


def train_run(config: Config, world: World, corpus: Corpus | None, command_line: Sequence[str]) -> str:
    """Trains and writes the run's folder; `corpus` is given on the first rank. Returns what to say at the end.

    Raises ShardtuneError, each with its exit code.
    """
    folder = Path(config.runs) / config.name
    check_device(config, world)
    config = take_over(config)
    prepared = prepare(config, world, corpus)
    sources = [source.path for source in config.data.sources]
    tuning = make_tuning(config.tuning, config.task.kind, prepared.tokenizer, sources, config.seed)
    build = functools.partial(make_skeleton, config, prepared, config.model.path, config.model.weights == "pretrained")
    if isinstance(tuning, Eva):
        observe_inputs(tuning, config, world, build, prepared.task, prepared.tables["train"], prepared.train_counts)
    skeleton = build()
    if isinstance(prepared.task, Chat):
        prepared.task.stop_at_turns_end(skeleton.model)
    prepared.task = of_tasks(config, prepared.task)
    dtype = DTYPES[config.model.dtype]
    if hasattr(prepared.architecture, bottleneck.SETTINGS) and (tuning.makes_adapter or tuning.quantization):
        raise ConfigError(
            f"tuning.method: {config.model.path} has bottleneck adapters, beside which PEFT's do not work; tune it by "
            "adapter, bitfit, freeze or full"
        )
    if tuning.quantization is not None:
        quantize_layers(
            skeleton.model, config.task.kind, skeleton.recorder, tuning.quantization, dtype, config.model.path
        )
    with skeleton.recorder:
        model = tuning.apply(skeleton.model)
    if config.model.recompute == "full":
        skeleton.model.gradient_checkpointing_enable({"use_reentrant": False})
    shapes = {name: parameter.shape for name, parameter in model.named_parameters() if parameter.requires_grad}
    initial = skeleton.weights(model, config.seed, dtype, tuning.trained_dtype)
    if tuning.makes_adapter and initial.grown:
        raise ConfigError(
            f"model.tokenizer: has {len(prepared.tokenizer):,} tokens, more than {config.model.path}; an adapter would "
            "not hold the new ones. Use tuning.method: full, or the model's own tokenizer"
        )
    weights, notes = tuning.initial(model, initial, world), [*tuning.notes(), *task_notes(config)]
    if (earlier := folder_of(config)) is not None:
        weights, taken = begin_with(earlier, config.tuning.method, tuning, model, weights, prepared.labels)
        notes += taken
    if tuning.quantization is not None:
        weights = QuantizedWeights(model, weights, world.device, world.largest)
    # One rank decides: cards may differ, and all must choose alike.
    kind = world.first_does("strategy", lambda: choose_strategy(config.strategy, model, world, dtype))
    facts = _facts(config, world, prepared, skeleton, model, kind, notes)
    strategy = make_strategy(kind, model, world, dtype, config.strategy.offload, config.strategy.nvme)
    strategy.prepare(model, weights, make_optimizer_recipe(config.optimizer, model, tuning))
    if config.data.batching == "packed":
        vocabulary = prepared.architecture.get_text_config().vocab_size
        check_isolation(prepared.task, strategy, vocabulary, world.device, dtype != torch.float32, config.model.path)
    model.train()
    world.seed_everything(config.seed)

    devices = world.gather(_device_name(world.device))
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
        config.evaluation.beams, judged_at_once(config.batch), folder / "predictions",
    )  # fmt: skip
    reporter = Reporter(
        folder, world, state, total_steps, examples_of, config.tracking.every, config.evaluation.every,
        config.tracking.tensorboard, evaluator, evaluated_splits(prepared, config.evaluation.examples),
        config.model_dump(mode="json"),
    )  # fmt: skip
    reporter.progress.say(facts)
    if tuning.quantization is not None:
        reporter.progress.say(describe_stored([Stored(*rank) for rank in held]))
    rate_of = functools.partial(
        learning_rate, total_steps=total_steps, peak=config.optimizer.lr,
        schedule=config.optimizer.schedule, warmup=config.optimizer.warmup,
    )  # fmt: skip
    begun = time.monotonic()
    try:
        if config.evaluation.baseline and total_steps > 0:
            reporter.evaluate()
        train(
            state, total_steps, steps, *tuning.in_training(prepared.task, strategy, total_steps, world), world, rate_of,
            functools.partial(clip_scale, max_grad_norm=config.optimizer.max_grad_norm),
            reporter.after_step,
        )  # fmt: skip
        if stream is not None and stream.noted:
            reporter.progress.say(f"in the stream, as far as it was read: {_counted(stream.noted)}")
        reporter.evaluate()
        updated = any(rate_of(step) > 0 for step in range(total_steps))
        for note in write_result(
            folder / "final", model, strategy, weights, prepared.tokenizer, prepared.labels, skeleton.stored_dtype,
            tuning, shapes, updated, world,
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
    return _last_words(folder, config, reporter.before_and_after(), time.monotonic() - begun)


def prepare(config: Config, world: World, corpus: Corpus | None, result: Path | None = None) -> Prepared:
    """Architecture, tokenizer and tokenized examples; what takes long is done once, on the first rank.

    With a `result`'s folder its tokenizer and labels are used, whatever the data would give today.
    """
    task_kind, trust = config.task.kind, config.model.trust_remote_code
    architecture = load_architecture(config.model.path, task_kind, trust)
    if config.model.dropout is not None:
        set_dropout(architecture, config.model.dropout)
    given = config.model.tokenizer
    newly_trained = given is not None and given.startswith("train:")
    side = config.task.truncation_side
    source = given or config.model.path
    if result is not None:
        source = str(result)
    elif newly_trained:
        source = world.first_does("tokenizer", lambda: _trained_tokenizer(config, corpus))
    tokenizer = load_tokenizer(source, side, trust)
    fit_config(architecture, tokenizer, newly_trained)
    labels: list[str] = []
    if task_kind == "classification":
        labels = saved_labels(result) if result is not None else world.first_does("labels", lambda: _labels(corpus))
        name_labels(architecture, labels)
    check_positions(config, architecture)
    if is_chat(config.task) and result is None:  # a result's tokenizer has the template
        set_template(tokenizer, getattr(config.task, "template", None))
    task = make_task(config.task, config.model.path, tokenizer, architecture, labels)
    folders = world.first_does("tables", lambda: _tokenize(config, task, tokenizer, labels, corpus))
    counts = world.first_does(
        "sources", lambda: {"train": corpus.train_counts, **corpus.judged_counts} if corpus is not None else {}
    )
    tables = {}
    for name, folder in folders.items():
        table = open_table(Path(folder))
        if table is None:
            raise DataError(f"{folder}: the tokenized {name} split is not there; do all nodes see this folder?")
        table.counts = counts.get(name, ())
        tables[name] = table
    return Prepared(architecture, tokenizer, task, labels, tables, counts["train"], corpus)


def name_labels(architecture: PreTrainedConfig, labels: Sequence[str]) -> None:
    """Gives the model a head of one output for each label, by their names."""
    architecture.num_labels = len(labels)
    architecture.id2label = dict(enumerate(labels))
    architecture.label2id = {label: index for index, label in enumerate(labels)}


def make_skeleton(config: Config, prepared: Prepared, path: str, pretrained: bool) -> Skeleton:
    """The model on the meta device."""
    model = config.model
    skeleton = build_skeleton(
        prepared.architecture, path, config.task.kind, pretrained, model.attention, model.layers,
        model.trust_remote_code,
    )  # fmt: skip
    quicken_dropout(skeleton.model)
    if config.data.batching == "packed":
        keep_apart(skeleton.model, path, longest_row(config), flash=model.attention == "flash_attention_2")
    return skeleton


def evaluated_splits(prepared: Prepared, limit: int) -> list[Split]:
    """Validation and test, those of them that have examples."""
    found = []
    for name in ("validation", "test"):
        table = prepared.tables.get(name)
        if table is not None and len(table):
            texts = prepared.corpus.judged[name] if prepared.corpus is not None else []
            found.append(Split(name, table, min(len(table), limit), texts))
    return found


def _trained_tokenizer(config: Config, corpus: Corpus | None) -> str:
    assert corpus is not None
    assert config.model.tokenizer is not None
    pieces = int(config.model.tokenizer.removeprefix("train:"))
    key = fingerprint("tokenizer", 1, corpus.fingerprint, pieces, config.task.kind)
    folder = cache_folder() / "tokenizers" / key
    if not (folder / "tokenizer.json").exists():
        partial = folder.with_name(f"{key}.{os.getpid()}")
        parts = contents if is_chat(config.task) else lambda source, target: [source, target]
        texts = [text for example in corpus.splits().train for text in parts(example.source, example.target)]
        train_tokenizer(texts, pieces, config.task.kind, partial)
        if folder.exists():
            return str(folder)
        partial.rename(folder)
    return str(folder)


def _labels(corpus: Corpus | None) -> list[str]:
    assert corpus is not None
    labels = corpus.labels
    if len(labels) < 2:
        raise DataError(f"every training example has the label {labels[0]!r}; there is nothing to tell apart")
    return labels


def _tokenize(
    config: Config, task: Task, tokenizer: PreTrainedTokenizerBase, labels: list[str], corpus: Corpus | None
) -> dict[str, str]:
    """Token tables of all splits, from the cache where they are there. Split -> folder."""
    assert corpus is not None
    settings = config.task.model_dump(include={"kind", "max_source_tokens", "max_target_tokens", "text"})
    if is_chat(config.task):  # the template's text, for a file can change under its name; tools are in the sources
        settings["chat_template"] = tokenizer.chat_template
    folders = {}
    tokenizer_identity = identity(tokenizer)  # before tokenizing, which leaves its settings in the tokenizer
    for name in ("validation", "test") if config.data.streaming else ("train", "validation", "test"):
        key = fingerprint("tokens", 1, corpus.fingerprint, name, settings, labels, tokenizer_identity)
        folder = cache_folder() / "tokens" / key
        if open_table(folder) is None:
            texts: list[Text] = getattr(corpus.splits(), name)
            pieces = (texts[start : start + ENCODED_AT_ONCE] for start in range(0, len(texts), ENCODED_AT_ONCE))
            write_table(folder, (encoded for piece in pieces for encoded in task.encode(piece)))
        folders[name] = str(folder)
    return folders


def _facts(
    config: Config,
    world: World,
    prepared: Prepared,
    skeleton: Skeleton,
    model: nn.Module,
    kind: str,
    notes: Sequence[str],
) -> str:
    """A few lines at the start: what is trained on what, and what was left out."""
    total = sum(getattr(p, "unpacked_shape", p.shape).numel() for p in model.parameters())
    trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
    counts = ", ".join(f"{len(table):,} {name}" for name, table in prepared.tables.items() if len(table))
    batch = config.batch
    steps = f"{batch.examples:,} examples a step" if batch.examples else f"at most {batch.tokens:,} tokens a step"
    weights = "random weights" if config.model.weights == "random" else config.model.path
    lines = [
        f"{config.name}: {type(skeleton.model).__name__} ({weights}), {config.task.kind}, {config.tuning.method}: "
        f"{trained:,} of {total:,} parameters trained",
        *(f"  {note}" for note in notes),
        f"{kind} on {world.size} rank{'s' * (world.size > 1)} ({_device_name(world.device)}), {config.model.dtype}, "
        + (f"offload: {config.strategy.offload}, " if config.strategy.offload != "none" else "")
        + f"{config.optimizer.name}; {steps}",
        f"examples: {counts or 'a stream'}" + (f"; {len(prepared.labels):,} labels" if prepared.labels else ""),
        *describe_sources(config, prepared.tables.get("train"), prepared.train_counts),
    ]
    if not any(len(table) for name, table in prepared.tables.items() if name != "train"):
        lines.append("no validation or test examples, so nothing is evaluated")
    for name, table in prepared.tables.items():
        cut = [f"{n:,} {what}" for n, what in ((table.source_cut, "sources"), (table.target_cut, "targets")) if n]
        if cut:
            lines.append(f"cut to length in {name}: {' and '.join(cut)} of {len(table):,}")
    dropped = prepared.corpus.dropped if prepared.corpus is not None else {}
    if dropped:
        lines.append(f"left out or noted: {_counted(dropped)}")
    if skeleton.new_parameters:
        lines.append(f"new, not in the pretrained weights: {', '.join(skeleton.new_parameters)}")
    lines.append("no checkpoints are written during the run in this version, only the result")
    return "\n".join(lines)


def _counted(reasons: Mapping[str, int]) -> str:
    return ", ".join(f"{count:,} {reason}" for reason, count in reasons.items())


def _last_words(folder: Path, config: Config, results: str, seconds: float) -> str:
    lines = ["", results, ""] if results else [""]
    lines += [
        f"done in {seconds / 60:.1f} minutes; the result is in {folder / 'final'}",
        f"  try it:       shardtune generate --run {folder} TEXT",
        f"  see it:       tensorboard --logdir {folder / 'tensorboard'}",
        *([f"  read it:      {folder / 'predictions'}"] if results else []),
        f"  take it:      shardtune export --run {folder} --out DIR",
    ]
    return "\n".join(lines)


def _device_name(device: torch.device) -> str:
    return torch.cuda.get_device_name(device) if device.type == "cuda" else "CPU"


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """A good run's output is calm: libraries say only what is wrong."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which peft imports, warns that it chose this
    for name in ("DeepSpeed", "torch.distributed", "huggingface_hub", "datasets", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield
