"""What a run that goes on from a checkpoint may do otherwise than the run that saved it. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Callable, Iterator, Mapping
from typing import Any

from pydantic import ValidationError

from shardtune.config import Config, DataConfig, DurationConfig
from shardtune.config_file import flat
from shardtune.errors import CheckpointError
from shardtune.task.registry import SECTIONS
from shardtune.tuning_config import AdaloraConfig

UNSAID = frozenset({"name", "runs", "checkpoint.resume"})
"""Keys that say where a run is; their changes are not worth a line."""

FREE_SECTIONS = ("strategy", "duration", "checkpoint", "evaluation", "tracking", "kernels")
"""Sections whose keys decide how, how long and how closely watched a run is computed, not what."""
FREE = frozenset(
    {
        "model.dtype", "model.attention", "model.recompute", "model.dropout", "model.trust_remote_code",
        "data.batching", "data.prefetch", "batch.micro_examples", "batch.micro_tokens",
        "tuning.dropout", "tuning.ratio", "tuning.interval", "tuning.beta1", "tuning.beta2", "tuning.orthogonality",
        "optimizer.lr", "optimizer.weight_decay", "optimizer.schedule", "optimizer.warmup", "optimizer.max_grad_norm",
        "optimizer.betas", "optimizer.eps", "optimizer.scale_parameter", "optimizer.decay_rate",
        "optimizer.clip_threshold", "optimizer.momentum", "optimizer.iterations",
    }
)  # fmt: skip
"""Other keys that may change: those of how it is computed, and those of how later steps are made."""

_EXAMPLES = "it decides what an example is"
_STEPS = "it decides which examples make which step, so some would be learned twice and others never"
_MODEL = "what was trained belongs to that model"
_TRAINED = "it decides which weights are trained, and what the saved ones mean"
_BEGINNING = "it decides what training began from"
_BEGUN = {
    "seed": "it decides the order of the examples and what is random in the model",
    "model.path": _MODEL,
    "model.tokenizer": "it decides the tokens of every example",
    "model.weights": _BEGINNING,
    "model.layers": _MODEL,
    "data.train": _STEPS,
    "data.validation": "the training examples would not be the same",
    "data.test": "the training examples would not be the same",
    "data.splits": "the training examples would not be the same",
    "data.shuffle": _STEPS,
    "data.streaming": _STEPS,
    "data.shuffle_buffer": _STEPS,
    "batch.examples": _STEPS,
    "batch.tokens": _STEPS,
    "optimizer.name": "what the optimizer has kept of earlier steps is of no use to another one",
    "tuning.quantization": _BEGINNING,
    "tuning.double_quant": _BEGINNING,
    "tuning.from": _BEGINNING,
    "tuning.text": _BEGINNING,
    "tuning.examples": _BEGINNING,
    "tuning.rho": _BEGINNING,
    "tuning.iterations": _BEGINNING,
    "tuning.dtype": "the weights are saved in it",
    "tuning.begin": "ranks have fallen, or not, by the old one",
    "tuning.end": "ranks have fallen, or not, by the old one",
}
_SHAPING = (
    "method", "rank", "initial_rank", "alpha", "targets", "feedforward", "factor", "block_size", "virtual_tokens",
    "projection", "hidden_size", "encoder", "layers", "embeddings", "patterns", "placement", "size", "activation",
)  # fmt: skip
FIXED: Mapping[str, str] = {
    **_BEGUN,
    **{f"tuning.{key}": _TRAINED for key in _SHAPING},
    **{f"task.{key}": _EXAMPLES for section in SECTIONS.values() for key in section.model_fields},
}
"""Keys whose change makes what was saved meaningless, and why; a few of them only in some cases: see `_reason`."""

KINDS = {"task": "kind", "tuning": "method", "optimizer": "name"}
"""Sections whose other keys depend on one of them: where that has changed, the others are not compared."""


def compare(
    saved: Mapping[str, Any],
    config: Config,
    data: Mapping[str, Any] | None,
    base: str | None,
    place: Callable[[str], str] = lambda key: "",
) -> list[str]:
    """What a run does otherwise than the one that saved a checkpoint, a line for each harmless change.

    `saved`: the checkpoint's state, of which config, data, base and step are read. `config`: that of this run, as it
    is after the options of `tuning.from` were taken over. `data`: the training examples, as {"fingerprint":
    Corpus.train_fingerprint, "examples": N}; None of a stream. `base`: the identity of the model's files. `place`:
    FILE:LINE of a key, or "".

    Raises CheckpointError with a line for each change that makes the saved state meaningless.
    """
    then, now = config_of(saved), config
    same_data = data is not None and saved.get("data") == dict(data)
    same_base = base is not None and saved.get("base") == base
    harmless: list[str] = []
    refused: list[str] = []
    old, new = flat(then), flat(now)
    for key in [key for key in {**old, **new} if old.get(key) != new.get(key)]:
        section, _, name = key.partition(".")
        kind = KINDS.get(section)
        other = kind is not None and name != kind and old[f"{section}.{kind}"] != new[f"{section}.{kind}"]
        if other or section == "duration":
            continue
        line = f"{key}: {shown(new.get(key))}, was {shown(old.get(key))}"
        reason = _reason(key, then, now, same_data, same_base)
        if reason is not None:
            refused.append(_placed(place(key), f"{line}: {reason}"))
        elif key not in UNSAID:
            harmless.append(line)
    if then.duration != now.duration:
        line, reason = _duration(then, now)
        if reason is not None:
            refused.append(_placed(place("duration"), f"{line}: {reason}"))
        else:
            harmless.append(line)
    refused += _changed_content(saved, config, data, base, place, said=" ".join(refused))
    if not refused:
        return harmless
    raise CheckpointError(
        "\n".join(refused) + f"\nThis does not fit what was saved at step {saved['step']:,}. Go on with the old "
        "values, or give checkpoint.resume=never to set the run's folder aside and begin anew, or another name=…"
    )


def config_of(saved: Mapping[str, Any]) -> Config:
    """The config in a checkpoint's state; keys that this version has and that one had not, with their defaults.

    Raises CheckpointError where there is none that this version can read.
    """
    try:
        return Config.model_validate(saved.get("config"))
    except ValidationError as error:
        detail = error.errors(include_url=False)[0]
        key = ".".join(map(str, detail["loc"]))
        raise CheckpointError(
            f"the config that was saved at step {saved['step']:,} is of another version of shardtune: {key}: "
            f"{detail['msg'].lower()}; go on with that version, or give checkpoint.resume=never to begin anew"
        ) from None


def _reason(key: str, then: Config, now: Config, same_data: bool, same_base: bool) -> str | None:
    """Why a changed key makes the saved state meaningless; None where it does not."""
    if key not in FIXED:
        return None
    harmless = {
        "model.path": same_base,
        "data.train": same_data and _parts(then.data) == _parts(now.data),
        "data.validation": _trained_share(then.data) == _trained_share(now.data),
        "data.test": _trained_share(then.data) == _trained_share(now.data),
        "data.splits": _trained_share(then.data) == _trained_share(now.data),
        "data.shuffle_buffer": not (now.data.streaming and now.data.shuffle),
    }
    return None if harmless.get(key) else FIXED[key]


def _changed_content(
    saved: Mapping[str, Any],
    config: Config,
    data: Mapping[str, Any] | None,
    base: str | None,
    place: Callable[[str], str],
    said: str,
) -> Iterator[str]:
    """Data and models that have changed behind the same path. `said`: the keys that are refused anyhow."""
    old = saved.get("data")
    if data is not None and old is not None and old != dict(data) and "data." not in said and "task." not in said:
        now, was = data["examples"], old["examples"]
        counts = f"{now:,} examples, was {was:,}" if now != was else f"other examples, {now:,} as before"
        yield _placed(place("data.train"), f"data.train: the training data has changed: {counts}")
    known = base is not None and saved.get("base") is not None
    if known and saved["base"] != base and "model." not in said:
        problem = f"the model in {config.model.path} is not the one that the run began with"
        yield _placed(place("model.path"), f"model.path: {problem}")


def _placed(place: str, problem: str) -> str:
    return f"{place} {problem}" if place else problem


def _parts(data: DataConfig) -> list[tuple[float | None, float | None]]:
    """How much of each source is trained on."""
    return [(source.weight, source.tokens) for source in data.sources]


def _trained_share(data: DataConfig) -> float:
    """The share of the examples of `data.train` that are trained on."""
    return data.splits[0] if data.validation is None and data.test is None else 1.0


def _length(duration: DurationConfig) -> tuple[str, float]:
    """The key that is given, and its value."""
    return next((key, value) for key, value in duration.model_dump().items() if value is not None)


def is_longer(now: DurationConfig, then: DurationConfig) -> bool | None:
    """Whether a run is to last longer than it was; None where steps, epochs and minutes would have to be compared."""
    (kind, length), (old_kind, old_length) = _length(now), _length(then)
    return length > old_length if kind == old_kind else None


def _duration(then: Config, now: Config) -> tuple[str, str | None]:
    """What a changed duration means, and why it cannot be changed, if so."""
    (kind, length), (old_kind, old_length) = _length(now.duration), _length(then.duration)
    longer = is_longer(now.duration, then.duration)
    line = f"duration.{kind}: {shown(length)}, was {shown(old_length)}{'' if kind == old_kind else f' {old_kind}'}"
    if isinstance(now.tuning, AdaloraConfig) and not longer:
        return line, "adalora's ranks fall at shares of the steps, and the last time may have been missed"
    if now.optimizer.schedule == "constant":
        return line, None
    rate = {True: "higher", False: "lower", None: "another"}[longer]
    return (
        f"{line}; the learning rate now falls to zero at the new end, so from here on it is {rate} than planned",
        None,
    )


def shown(value: object) -> str:
    """As in a config file; large numbers with commas."""
    if isinstance(value, int) and not isinstance(value, bool):
        return f"{value:,}"
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)
