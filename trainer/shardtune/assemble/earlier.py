"""`tuning.from`: the options of the adapter that a run begins with. Imports no torch."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from shardtune.config import Config
from shardtune.errors import ConfigError
from shardtune.tuning_config import TuningConfig

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


def take_over(config: Config, resumed: Mapping[str, Any] | None = None) -> Config:
    """The config with the options that the earlier adapter has and the config's file does not give.

    `resumed`: the `tuning` of the resolved config of a run that is gone on with; it has them, and the adapter, which
    may be gone, is not read. Raises ConfigError where one that is given differs, or the adapter is of another method.
    """
    folder = folder_of(config)
    if folder is None:
        return config
    if resumed is not None:
        tuning = config.tuning
        taken = {name: resumed[name] for name in OPTIONS if name in resumed and _is_open(tuning, name)}
        return config.model_copy(update={"tuning": tuning.model_copy(update=taken)})
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
        if _is_open(tuning, option):
            yield option, theirs
        elif option not in MATCHED and ours != theirs:
            raise ConfigError(
                f"tuning.{option}: is {ours}, but that of the adapter in {earlier.folder} is {theirs}; give the same, "
                "or leave the key out"
            )


def _is_open(tuning: TuningConfig, option: str) -> bool:
    """Whether the config's file leaves it to the adapter."""
    return option not in tuning.model_fields_set or getattr(tuning, option) is None
