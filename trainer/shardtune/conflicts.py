"""Which combinations of valid values cannot work: the one place where they are refused."""

from __future__ import annotations

import difflib
from collections.abc import Iterator

from shardtune.config import BATCH_SIZES, Config, DataConfig
from shardtune.metrics import has_direction, score_names
from shardtune.optimizer_config import PagedAdamw8bitConfig, PagedAdamwConfig, ScheduleFreeConfig
from shardtune.tuning_config import (
    AdaloraConfig,
    AdapterSection,
    EvaConfig,
    LoftqConfig,
    MultitaskPromptConfig,
    PissaConfig,
    PrefixConfig,
    VeraConfig,
    VirtualTokensSection,
)

WHOLE = "it updates whole matrices, and ZeRO joins all parameters and splits them anywhere"
BLOCKS = (
    "its blocks of 256 elements with a common scale would lie elsewhere for each number of ranks, as ZeRO joins all "
    "parameters and splits them anywhere; losses would differ by 1e-4"
)


def conflicts(config: Config) -> Iterator[tuple[str, str]]:
    """Combinations of valid values that cannot work: pairs of (key, what is wrong with it)."""
    task, model = config.task, config.model
    yield from task.problems()
    yield from _mixture_conflicts(config.data)
    if config.data.streaming:
        yield from _stream_conflicts(config)
    if config.data.validation is None and config.data.test is None and abs(sum(config.data.splits) - 1) > 1e-6:
        yield "data.splits", f"the shares add up to {sum(config.data.splits):g}, not to 1"
    if config.data.splits[0] == 0.0:
        yield "data.splits", "the share of the training examples, the first, cannot be 0"
    for examples, tokens in BATCH_SIZES:
        given = [key for key in (examples, tokens) if getattr(config.batch, key) is not None]
        if len(given) != 1:
            yield f"batch.{tokens}", f"give exactly one of batch.{examples} and batch.{tokens}"
    if model.attention == "flash_attention_2" and model.dtype == "float32":
        yield "model.attention", "flash_attention_2 computes in 16 bits only; use model.dtype: bfloat16, or sdpa"
    if config.data.batching == "packed":
        if not task.packs:
            yield "data.batching", f"examples of task.kind: {task.kind} cannot share a row; use grouped"
        if model.attention in ("eager", "flex_attention"):
            yield (
                "model.attention",
                f"{model.attention} does not keep packed examples apart; use auto, sdpa or flash_attention_2",
            )
    yield from _memory_conflicts(config)
    duration = config.duration
    if [duration.epochs, duration.steps, duration.minutes].count(None) != 2:
        yield "duration", "give exactly one of duration.epochs, duration.steps and duration.minutes"
    if duration.minutes is not None and isinstance(config.tuning, AdaloraConfig):
        yield "duration.minutes", "adalora's ranks fall at shares of the steps, whose number must be known; give steps"
    if model.tokenizer and model.tokenizer.startswith("train:"):
        pieces = model.tokenizer.removeprefix("train:")
        if not (pieces.isascii() and pieces.isdigit()) or int(pieces) < 300:
            yield "model.tokenizer", "train:N needs a whole number N of pieces, at least 300 (256 are the bytes)"
        if model.weights == "pretrained":
            yield (
                "model.tokenizer",
                "a newly trained tokenizer does not fit pretrained weights; use model.weights: random",
            )
    if isinstance(config.tuning, AdaloraConfig):
        tuning = config.tuning
        if tuning.initial_rank < tuning.rank:
            yield "tuning.initial_rank", f"ranks fall, so it cannot be below tuning.rank, which is {tuning.rank}"
        if tuning.begin >= tuning.end:
            yield "tuning.begin", f"{tuning.begin:g} is not before tuning.end, which is {tuning.end:g}"
    if isinstance(config.tuning, VeraConfig) and (config.tuning.dtype, model.dtype) == ("bfloat16", "float32"):
        yield (
            "tuning.dtype",
            "vera's projections are stored as the model computes; use float32, or model.dtype: bfloat16",
        )
    dtypes = getattr(config.tuning, "dtype", "float32"), model.dtype
    if config.strategy.kind == "zero3" and dtypes == ("bfloat16", "float32"):
        yield "tuning.dtype", "zero3 stores all weights as the model computes; use float32, or model.dtype: bfloat16"
    if config.model.layers is not None and isinstance(config.tuning, AdapterSection):
        yield "model.layers", "an adapter is loaded beside the whole model; use tuning.method: full or freeze"
    if isinstance(config.tuning, PissaConfig) and config.tuning.dropout > 0:
        yield (
            "tuning.dropout",
            "pissa's adapters are a part of the weight, which dropout would take away; leave it 0, or use lora",
        )
    if isinstance(config.tuning, EvaConfig) and config.data.streaming:
        yield "tuning.method", "eva reads training examples before the first step, which a stream does not allow"
    if config.model.layers is not None and not config.model.layers:
        yield "model.layers", "keep at least one layer, or leave the key out to keep all"
    yield from _tuning_conflicts(config)
    yield from _evaluation_conflicts(config)
    if config.evaluation.metrics is not None:
        wrong = [name for name in config.evaluation.metrics if ":" not in name and name not in task.scores]
        if wrong:
            yield (
                "evaluation.metrics",
                f"{', '.join(wrong)}: not for this task, whose metrics are {', '.join(task.scores)}",
            )
            return
    yield from _best_conflicts(config)


def _best_conflicts(config: Config) -> Iterator[tuple[str, str]]:
    evaluation, data = config.evaluation, config.data
    if evaluation.best is not None:
        metrics = config.task.usual_scores if evaluation.metrics is None else evaluation.metrics
        names = [name for name in score_names(metrics) if has_direction(name)]
        if evaluation.best not in names:
            own = [name for name in names if name.partition(":")[2] == evaluation.best]
            close = own or difflib.get_close_matches(evaluation.best, names, 1)
            hint = f"; did you mean {close[0]}?" if close else ""
            yield "evaluation.best", f"{evaluation.best} is not among what is scored: {', '.join(names)}{hint}"
    for key in ("best", "patience"):
        if getattr(evaluation, key) is not None and data.validation is None and data.test is not None:
            yield f"evaluation.{key}", "looks at validation, which has no examples; give data.validation"


def _evaluation_conflicts(config: Config) -> Iterator[tuple[str, str]]:
    options, shown = config.evaluation, any(count > 0 for count in config.evaluation.shots)
    given = {
        "shots": shown,
        "stop": bool(options.stop),
        "beams": options.beams > 1,
        "length_penalty": options.length_penalty != 1.0,
        "min_new_tokens": options.min_new_tokens > 0,
        "no_repeat_ngram": options.no_repeat_ngram > 0,
        "temperature": options.temperature > 0,
        "top_k": options.top_k is not None,
        "top_p": options.top_p is not None,
    }
    if not config.task.writes_texts:
        for key in (key for key, is_given in given.items() if is_given):
            yield f"evaluation.{key}", f"is for texts that a model writes, and task.kind: {config.task.kind} has none"
        return
    if options.min_new_tokens > options.max_new_tokens:
        yield (
            "evaluation.min_new_tokens",
            f"{options.min_new_tokens} is more than evaluation.max_new_tokens, which is {options.max_new_tokens}",
        )
    if options.temperature > 0 and options.beams > 1:
        yield "evaluation.temperature", "beams are not drawn; use evaluation.beams: 1, or temperature: 0"
    if options.length_penalty != 1.0 and options.beams == 1:
        yield "evaluation.length_penalty", "texts of different length are compared by beam search only; give beams"
    for key in ("top_k", "top_p"):
        if given[key] and options.temperature == 0:
            yield f"evaluation.{key}", "nothing is drawn at temperature 0; give evaluation.temperature"
    if shown and not options.baseline:
        yield "evaluation.shots", "are judged before the first step, which evaluation.baseline: false leaves out"
    if shown and config.data.streaming:
        yield "evaluation.shots", "are drawn from all training examples, which a stream does not read beforehand"


def _memory_conflicts(config: Config) -> Iterator[tuple[str, str]]:
    strategy, optimizer = config.strategy, config.optimizer
    able = {"none": [], "cpu": ["fsdp2", "zero2", "zero3"], "nvme": ["zero3"]}[strategy.offload]
    if able and strategy.kind not in ("auto", *able):
        yield (
            "strategy.offload",
            f"{strategy.offload} is not for strategy.kind: {strategy.kind}, only for {', '.join(able)}",
        )
    if (strategy.offload == "nvme") != (strategy.nvme is not None):
        missing = strategy.nvme is None
        yield (
            "strategy.nvme",
            "offload: nvme needs a folder on a fast local disk" if missing else "only with strategy.offload: nvme",
        )
    if strategy.offload == "nvme" and optimizer.name != "adamw":
        yield "optimizer.name", f"{optimizer.name} cannot be offloaded to a disk; use adamw, or offload: cpu"
    if strategy.offload != "none" and isinstance(optimizer, PagedAdamwConfig | PagedAdamw8bitConfig):
        yield (
            "optimizer.name",
            f"{optimizer.name} has pages in the host's memory by itself; leave strategy.offload out, or use "
            f"{optimizer.name.removeprefix('paged_')}",
        )
    reason = {
        "adafactor": WHOLE,
        "muon": WHOLE,
        "adamw_8bit": BLOCKS,
        "paged_adamw_8bit": BLOCKS,
        "lion_8bit": BLOCKS,
        "schedule_free": "the average of the weights, which is what is evaluated, is out of reach",
    }.get(optimizer.name)
    if strategy.kind.startswith("zero") and reason is not None:
        yield (
            "optimizer.name",
            f"{optimizer.name} does not go with {strategy.kind}: {reason}. Use strategy.kind: fsdp2 or ddp",
        )
    if isinstance(optimizer, ScheduleFreeConfig) and isinstance(config.tuning, AdaloraConfig):
        yield (
            "optimizer.name",
            "schedule_free would bring back what tuning.method: adalora takes away; use another optimizer",
        )


def _tuning_conflicts(config: Config) -> Iterator[tuple[str, str]]:
    tuning, data = config.tuning, config.data
    if isinstance(tuning, VirtualTokensSection):
        if data.batching == "packed":
            yield (
                "data.batching",
                f"packed examples would share the virtual tokens of tuning.method: {tuning.method}; use grouped",
            )
        if isinstance(tuning, PrefixConfig) and config.model.recompute == "full":
            yield (
                "model.recompute",
                "a prefix is kept where keys and values of text already read are, which recomputation does without; "
                "use none, or tuning.method: prompt",
            )
        if isinstance(tuning, MultitaskPromptConfig) and data.streaming and len(data.sources) > 1:
            yield "data.streaming", "a stream does not tell the sources apart that multitask_prompt takes for its tasks"
    if isinstance(tuning, PissaConfig | EvaConfig | LoftqConfig) and getattr(tuning, "from") is not None:
        instead = "qlora" if isinstance(tuning, LoftqConfig) else "lora"
        yield (
            "tuning.from",
            f"an adapter begins either as tuning.method: {tuning.method} says or as another one; to go on from one, "
            f"use tuning.method: {instead}",
        )


def _mixture_conflicts(data: DataConfig) -> Iterator[tuple[str, str]]:
    if isinstance(data.train, str):
        return
    kinds = []
    for index, source in enumerate(data.train):
        key = f"data.train.{index}"
        if isinstance(source, str):
            kinds.append("path")
        elif (source.weight is None) == (source.tokens is None):
            yield key, "give exactly one of weight and tokens"
            return
        else:
            kinds.append("weight" if source.weight is not None else "tokens")
        if kinds[-1] != kinds[0]:
            names = {"path": "a path alone", "weight": "a weight", "tokens": "a share of tokens"}
            yield key, f"has {names[kinds[-1]]}, but the first source {names[kinds[0]]}; all are given alike"
            return
    total = sum(source.tokens or 0.0 for source in data.sources)
    if kinds[0] == "tokens" and abs(total - 1) > 1e-6:
        yield "data.train", f"the shares of tokens add up to {total:g}, not to 1"


def _stream_conflicts(config: Config) -> Iterator[tuple[str, str]]:
    key, duration = "data.streaming", config.duration
    if config.task.fields.labels_of is not None:
        yield key, "a classifier's labels must all be known before the first step; leave data.streaming out"
    if config.evaluation.examples is None:
        yield "evaluation.examples", "a stream is read as far as that only, so give a number"
    if duration.epochs is not None:
        yield "duration.steps", "a stream's length is not known, so give steps or minutes in place of duration.epochs"
    if (config.model.tokenizer or "").startswith("train:"):
        yield "model.tokenizer", "train:N reads all texts before the first step, which a stream does not allow"
    for index, source in enumerate(config.data.sources):
        place = "data.train" if isinstance(config.data.train, str) else f"data.train.{index}"
        if source.path == "docs:python":
            yield place, "docs:python is small and read whole; leave data.streaming out"
        elif source.path.lower().endswith(".json"):
            yield place, "a .json file can only be read whole; to stream it, make it .jsonl, one object a line"
