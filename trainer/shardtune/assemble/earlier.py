"""`tuning.from`: a run begins with the adapter of an earlier one, ours or PEFT's."""

from __future__ import annotations

import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from torch import nn

from shardtune.assemble.parts import saved_labels
from shardtune.config import Config
from shardtune.errors import ConfigError
from shardtune.model.overlay import MeanRepeated, Overlay, Readable
from shardtune.model.safetensors_files import Entry, open_files
from shardtune.protocols import BESIDE, Tuning, Weights

KINDS = {
    "prefix": "PREFIX_TUNING", "prompt": "PROMPT_TUNING", "p_tuning": "P_TUNING",
    "multitask_prompt": "MULTITASK_PROMPT_TUNING", "adalora": "ADALORA", "ia3": "IA3", "vera": "VERA", "loha": "LOHA",
    "lokr": "LOKR", "oft": "OFT", "ln_tuning": "LN_TUNING",
}  # fmt: skip
"""What PEFT calls a method; all others are kinds of LORA."""
OPTIONS = {
    "alpha": ("lora_alpha", "alpha"),
    "rank": ("target_r", "num_ranks", "r"),
    "initial_rank": ("init_r",),
    "targets": ("target_modules",),
    "feedforward": ("feedforward_modules",),
    "block_size": ("oft_block_size",),
    "factor": ("decompose_factor",),
    "virtual_tokens": ("num_virtual_tokens",),
    "projection": ("prefix_projection",),
    "encoder": ("encoder_reparameterization_type",),
    "hidden_size": ("encoder_hidden_size",),
}
"""Options that shape an adapter, and what PEFT calls them; the first that an adapter has."""
MATCHED = ("targets", "feedforward")
"""Options that can be written in many ways: the tensors tell whether they agree."""
MEANINGS = (
    "use_dora", "use_rslora", "bias", "lora_bias", "rank_pattern", "alpha_pattern", "layer_replication",
    "projection_prng_key", "decompose_both", "coft", "eps", "block_share", "use_cayley_neumann",
)  # fmt: skip
"""Settings of PEFT's that say what the tensors mean, and follow from the method."""
FACTORS = ("prefix_task_cols", "prefix_task_rows")
"""What a multitask prompt has of each task."""


class Earlier(NamedTuple):
    """An adapter in a folder."""

    folder: Path
    settings: dict[str, Any]
    """Its adapter_config.json."""

    @property
    def name(self) -> str:
        """For messages."""
        return f"tuning.from {self.folder}"


def folder_of(config: Config) -> Path | None:
    """What `tuning.from` names; None where nothing is begun from."""
    given = getattr(config.tuning, "from", None)
    return Path(given).expanduser() if given is not None else None


def open_earlier(folder: Path) -> Earlier:
    """The adapter's settings. Raises ConfigError where there is none."""
    path = folder / "adapter_config.json"
    if not path.exists():
        inside = folder / "final" / "adapter_config.json"
        hint = f"; did you mean {inside.parent}?" if inside.exists() else ""
        raise ConfigError(f"tuning.from {folder}: there is no adapter_config.json, so no adapter, in it{hint}")
    try:
        settings = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise ConfigError(f"tuning.from {folder}: its adapter_config.json cannot be read: {error}") from None
    return Earlier(folder, settings)


def take_over(config: Config) -> Config:
    """The config with the options that the earlier adapter has and the config's file does not give.

    Raises ConfigError where one that is given differs, or the adapter is of another method.
    """
    folder = folder_of(config)
    if folder is None:
        return config
    earlier = open_earlier(folder)
    method, kind = config.tuning.method, earlier.settings.get("peft_type")
    if kind != KINDS.get(method, "LORA"):
        ours = next((name for name, theirs in KINDS.items() if theirs == kind), "lora" if kind == "LORA" else None)
        fits = f" (tuning.method: {ours})" if ours else ""
        raise ConfigError(f"{earlier.name}: holds an adapter of kind {kind}{fits}, but tuning.method is {method}")
    return config.model_copy(update={"tuning": config.tuning.model_copy(update=dict(_options(config, earlier)))})


def _options(config: Config, earlier: Earlier) -> Iterator[tuple[str, Any]]:
    tuning, settings = config.tuning, earlier.settings
    for option, names in OPTIONS.items():
        name = next((name for name in names if name in settings), None)
        if name is None or option not in type(tuning).model_fields:
            continue
        theirs, ours = settings[name], getattr(tuning, option)
        if isinstance(theirs, str) and option == "encoder":
            theirs = theirs.lower()
        if theirs in (None, -1):  # PEFT's own choice, as our null
            continue
        if option not in tuning.model_fields_set or ours is None:
            yield option, theirs
        elif option not in MATCHED and ours != theirs:
            raise ConfigError(
                f"tuning.{option}: is {ours}, but that of the adapter in {earlier.folder} is {theirs}; give the same, "
                "or leave the key out"
            )


def begin_with(
    folder: Path, method: str, tuning: Tuning, model: nn.Module, weights: Weights, labels: Sequence[str]
) -> tuple[Weights, list[str]]:
    """The initial values of the applied `model`, which is on the meta device, with those of the adapter in `folder`;
    and what is to be said of them. `labels`: of this run.

    All tensors of the adapter are used, and every trained parameter is found; only a classification head begins anew
    where the labels are others. Raises ConfigError.
    """
    earlier = open_earlier(folder)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    names = {id(parameter): name for name, parameter in trained.items()}
    adapter = tuning.adapter(model, dict(trained))
    _same_meaning(earlier, method, adapter.settings)
    file, beside = folder / "adapter_model.safetensors", folder / BESIDE
    if not file.exists():
        raise ConfigError(f"{earlier.name}: there is no adapter_model.safetensors in it (pickles are never read)")
    entries = open_files([file])
    unknown = [key for key in entries if key not in adapter.tensors]
    if unknown:
        raise ConfigError(
            f"{earlier.name}: {len(unknown)} of its tensors have no place in this model, such as {unknown[0]}; "
            "are model.path and tuning.targets those that it was trained with?"
        )
    if adapter.beside and not beside.exists():
        raise ConfigError(
            f"{earlier.name}: does not hold {BESIDE}, the network that its vectors were computed by, which PEFT leaves "
            "out; so it cannot be trained further"
        )
    kept = {**adapter.tensors, **adapter.beside}
    found = {**entries, **(open_files([beside]) if adapter.beside else {})}
    others: dict[str, Readable] = {}
    notes: list[str] = []
    known = saved_labels(folder)
    for key, tensor in kept.items():
        name = names.get(id(tensor))
        if name is None or key not in found:  # computed from the others, or missing
            continue
        if ".modules_to_save." in name and (found[key].shape != tensor.shape or (known and known != list(labels))):
            continue
        others[name] = _readable(earlier, key, found[key], tuple(tensor.shape), notes)
    missing = [name for name in trained if name not in others]
    lacking = [name for name in missing if ".modules_to_save." not in name]
    if lacking:
        raise ConfigError(
            f"{earlier.name}: has nothing for {len(lacking)} of {len(trained)} trained parameters, such as "
            f"{lacking[0]}; are model.path and tuning.targets those that it was trained with?"
        )
    if missing:
        notes.append("the classification head begins anew: its labels are not those of the adapter")
    return Overlay(weights, others), [f"begins as the adapter in {folder}", *notes]


def _same_meaning(earlier: Earlier, method: str, settings: Any) -> None:
    ours = json.loads(json.dumps(settings.to_dict(), default=str))
    for key in MEANINGS:
        if key in earlier.settings and key in ours and (earlier.settings[key] or None) != (ours[key] or None):
            raise ConfigError(
                f"{earlier.name}: its {key} is {earlier.settings[key]}, but that of tuning.method: {method} is "
                f"{ours[key]}"
            )


def _readable(earlier: Earlier, key: str, entry: Entry, shape: tuple[int, ...], notes: list[str]) -> Readable:
    """The values of a parameter of this shape. Raises ConfigError where the adapter's do not fit."""
    if entry.shape == shape:
        return entry
    if entry.shape[1:] == shape[1:] and key in FACTORS:
        notes.append(f"{key} of each task begins as the mean of those of the adapter's {entry.shape[0]} tasks")
        return MeanRepeated(entry)
    stacks = earlier.settings.get("num_transformer_submodules")
    if key == "prompt_embeddings" and entry.shape == (shape[0] * (stacks or 1), *shape[1:]):
        return entry  # PEFT also makes vectors for a decoder, after the others, and never reads them
    raise ConfigError(f"{earlier.name}: {key} has shape {list(entry.shape)}, but this model needs {list(shape)}")
