"""The tokenizer of a run: the model's own, another one, or one trained on the training texts."""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Iterable
from pathlib import Path

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer, PreTrainedConfig, PreTrainedTokenizerBase, PreTrainedTokenizerFast

from shardtune.errors import ConfigError
from shardtune.heads import HEADS

PAD, END, BEGIN, UNKNOWN = "<pad>", "</s>", "<s>", "<unk>"


def load_tokenizer(path: str, truncation_side: str, trust_remote_code: bool) -> PreTrainedTokenizerBase:
    """The tokenizer of a folder or hub id; one without a padding token pads with its end token, which masks hide.

    Raises ConfigError where there is none, or where it has no end token.
    """
    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError, KeyError, TypeError, ImportError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0]
        raise ConfigError(
            f"model.tokenizer {path}: no tokenizer can be loaded from there: {reason}. "
            "Name one in model.tokenizer, or train one with train:8000"
        ) from None
    if tokenizer.eos_token_id is None and tokenizer.sep_token_id is not None:
        tokenizer.eos_token = tokenizer.sep_token
    if tokenizer.eos_token_id is None:
        raise ConfigError(f"model.tokenizer {path}: has no end token")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    tokenizer.truncation_side = truncation_side
    return tokenizer


def train_tokenizer(texts: Iterable[str], pieces: int, task: str, folder: Path) -> None:
    """Trains a byte-level BPE of `pieces` pieces (any text can be written with it) and saves it to `folder`.

    `task`: the head. The end token is appended to texts in seq2seq; models whose head is new read the begin token
    before one text or two, and the end token after each; for decoders nothing is added here.
    """
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=pieces,  # pyright: ignore
        special_tokens=[PAD, END, BEGIN, UNKNOWN],  # pyright: ignore
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),  # pyright: ignore
        show_progress=False,  # pyright: ignore
    )
    tokenizer.train_from_iterator(texts, trainer)
    template = f"{BEGIN} $A {END}" if HEADS[task].is_new else {"seq2seq": f"$A {END}"}.get(task)
    if template:
        pair = f"{BEGIN} $A {END} $B:1 {END}:1" if HEADS[task].is_new else None
        specials = [(token, tokenizer.token_to_id(token)) for token in (BEGIN, END)]
        tokenizer.post_processor = processors.TemplateProcessing(template, pair, specials)  # pyright: ignore
    fast = PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token=PAD, eos_token=END, bos_token=BEGIN, unk_token=UNKNOWN
    )
    fast.save_pretrained(str(folder))


def identity(tokenizer: PreTrainedTokenizerBase) -> str:
    """A hash of all that decides which ids a text gets."""
    backend = getattr(tokenizer, "backend_tokenizer", None)
    content = backend.to_str() if backend is not None else repr(sorted(tokenizer.get_vocab().items()))
    settings = [type(tokenizer).__name__, tokenizer.truncation_side, repr(tokenizer.special_tokens_map)]
    return hashlib.sha256("\0".join([content, *settings]).encode()).hexdigest()


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, folder: Path) -> None:
    """Writes it to `folder`, the same whether texts were tokenized before or not: `tokenizer.json` would hold the
    length limit and the padding of the last call. Raises OSError."""
    if isinstance(tokenizer, PreTrainedTokenizerFast):
        tokenizer.backend_tokenizer.no_truncation()
        tokenizer.backend_tokenizer.no_padding()
    try:
        tokenizer.save_pretrained(str(folder))
    except Exception as error:
        code = re.search(r"\(os error (\d+)\)", str(error))  # of tokenizers, which has no class of its own for it
        if code is None:
            raise
        raise OSError(int(code[1]), os.strerror(int(code[1])), str(folder)) from error


def fit_config(config: PreTrainedConfig, tokenizer: PreTrainedTokenizerBase, newly_trained: bool) -> None:
    """Makes the model's vocabulary hold the tokenizer's.

    A newly trained tokenizer gives the config its size and its special tokens, in the roles that the old ones had
    (T5 starts its decoder with the padding token, BART with the end token). Otherwise a vocabulary only grows, and the
    model's own special tokens stay.
    """
    text_config = config.get_text_config()
    if not newly_trained:
        if len(tokenizer) > text_config.vocab_size:
            text_config.vocab_size = len(tokenizer)
        if text_config.pad_token_id is None:
            text_config.pad_token_id = tokenizer.pad_token_id
        return
    new = {
        "pad_token_id": tokenizer.pad_token_id,
        "eos_token_id": tokenizer.eos_token_id,
        "bos_token_id": tokenizer.bos_token_id,
    }
    roles = {_first(getattr(text_config, name, None)): value for name, value in reversed(new.items())}
    for name in ("decoder_start_token_id", "forced_bos_token_id", "forced_eos_token_id"):
        old = _first(getattr(text_config, name, None))
        if old is not None:
            setattr(text_config, name, roles.get(old, tokenizer.pad_token_id))
    for name, value in new.items():
        setattr(text_config, name, value)
    text_config.vocab_size = len(tokenizer)


def _first(token_id: int | list[int] | None) -> int | None:
    """Some configs list several end tokens."""
    return token_id[0] if isinstance(token_id, list) else token_id
