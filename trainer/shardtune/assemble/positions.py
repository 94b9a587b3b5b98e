"""How long rows become, and whether the model has positions for that."""

from __future__ import annotations

from transformers import PreTrainedConfig

from shardtune.config import Config
from shardtune.errors import ConfigError
from shardtune.tuning_config import PrefixConfig, VirtualTokensSection


def longest_row(config: Config) -> int:
    """Tokens that one row of the model may have for one example, virtual ones included: those of a prefix stand in the
    decoder of two stacks, others in its encoder."""
    first, *others = config.task.longest_rows
    if isinstance(config.tuning, PrefixConfig) and others:
        others[-1] += config.tuning.virtual_tokens
    elif isinstance(config.tuning, VirtualTokensSection):
        first += config.tuning.virtual_tokens
    return max([first, *others])


def longest_read(config: Config) -> int:
    """Of these tokens, those that are there before a text is written behind them: none in the decoder of two stacks,
    unless a prefix stands there."""
    one_stack, virtual = len(config.task.rows) == 1, getattr(config.tuning, "virtual_tokens", 0)
    read = config.task.max_source_tokens if one_stack else 0
    return read + (virtual if one_stack or isinstance(config.tuning, PrefixConfig) else 0)


def micro_batch_rows(config: Config) -> int:
    """Tokens that a rank computes on at once, or some more."""
    batch = config.batch
    return batch.micro_tokens or (batch.micro_examples or 1) * longest_row(config)


def known_positions(architecture: PreTrainedConfig) -> int | None:
    """As many as the model was made for; None: it does not say."""
    known = architecture.to_dict()
    positions = known.get("max_position_embeddings") or known.get("n_positions")
    if not isinstance(positions, int):
        return None
    if "roberta" in architecture.model_type:  # its positions begin after the padding index
        positions -= (architecture.pad_token_id or 0) + 1
    return positions


def check_positions(config: Config, architecture: PreTrainedConfig) -> None:
    """Models with a learned vector for each position have only so many; relative and rotary ones go on.

    Raises ConfigError where the token limits go beyond, or a text that is written can.
    """
    known, positions = architecture.to_dict(), known_positions(architecture)
    unbounded = known.get("relative_attention_num_buckets") or known.get("rope_parameters") or known.get("rope_theta")
    if positions is None or unbounded:
        return
    if (longest := longest_row(config)) > positions:
        together = longest > max(config.task.max_source_tokens, getattr(config.task, "max_target_tokens", 0))
        virtual = getattr(config.tuning, "virtual_tokens", 0)
        counted = f" with the {virtual} of tuning.virtual_tokens" if virtual else ""
        keys = "task.max_source_tokens and task.max_target_tokens together" if together else "task.max_source_tokens"
        raise ConfigError(
            f"{keys}: {longest} tokens{counted} are more than the {positions} positions of {config.model.path}"
        )
    read, new = longest_read(config), config.evaluation.max_new_tokens
    if config.task.writes_texts and read + new > positions:
        behind = f" behind the {read} tokens that may stand before them" if read else ""
        room = positions - read
        raise ConfigError(
            f"evaluation.max_new_tokens: {new}{behind} are more than the {positions} positions of {config.model.path}; "
            + (f"use at most {room}" if room > 0 else "make task.max_source_tokens smaller")
        )
