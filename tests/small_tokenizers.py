"""Tokenizers of the kinds that models have, made on the spot for the words of `tiny`."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import PreTrainedTokenizerFast

from tiny import WORDS


def fast(tokenizer: Tokenizer, **special: str) -> Any:
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, **special)


def template(tokenizer: Tokenizer, single: str, pair: str | None = None) -> None:
    named = dict.fromkeys(token.removesuffix(":1") for token in f"{single} {pair or ''}".split())
    specials = [(token, tokenizer.token_to_id(token)) for token in named if token not in ("$A", "$B")]
    tokenizer.post_processor = processors.TemplateProcessing(single, pair, specials)  # pyright: ignore


def sentencepiece(single: str) -> Any:
    """As T5's (`$A </s>`) and Llama's (`<s> $A`): unigrams, spaces written as ▁."""
    letters = sorted({letter for word in WORDS for letter in word})
    pieces = [("<pad>", 0.0), ("</s>", 0.0), ("<s>", 0.0), ("<unk>", -20.0), ("▁", -5.0)]
    pieces += [(f"▁{word}", -3.0) for word in WORDS] + [(letter, -8.0) for letter in letters]
    tokenizer = Tokenizer(models.Unigram(pieces, unk_id=3))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace()  # pyright: ignore
    tokenizer.decoder = decoders.Metaspace()  # pyright: ignore
    template(tokenizer, single)
    return fast(tokenizer, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>")


def wordpiece() -> Any:
    """As BERT's: [CLS] $A [SEP], lower case, ## for the inside of words."""
    special = ["[PAD]", "[UNK]", "[CLS]", "[SEP]"]
    letters = sorted({letter for word in WORDS for letter in word})
    vocabulary = [*special, *WORDS, *letters, *(f"##{letter}" for letter in letters)]
    tokenizer = Tokenizer(models.WordPiece({p: n for n, p in enumerate(dict.fromkeys(vocabulary))}, unk_token="[UNK]"))
    tokenizer.normalizer = normalizers.BertNormalizer()  # pyright: ignore
    tokenizer.pre_tokenizer = pre_tokenizers.BertPreTokenizer()  # pyright: ignore
    template(tokenizer, "[CLS] $A [SEP]", "[CLS] $A [SEP] $B:1 [SEP]:1")
    # load_tokenizer takes [SEP] for the end token.
    return fast(
        tokenizer, pad_token="[PAD]", unk_token="[UNK]", cls_token="[CLS]", sep_token="[SEP]", eos_token="[SEP]"
    )


def byte_level() -> Any:
    """As RoBERTa's: <s> $A </s>, any text in bytes, a space before a word is part of it."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = list(dict.fromkeys(("Ġ", letter) for letter in sorted({word[0] for word in WORDS})))
    pieces = ["<pad>", "<unk>", "<s>", "</s>", *alphabet, *("".join(pair) for pair in merges)]
    tokenizer = Tokenizer(models.BPE({piece: n for n, piece in enumerate(pieces)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    template(tokenizer, "<s> $A </s>", "<s> $A </s> </s> $B </s>")
    return fast(tokenizer, pad_token="<pad>", unk_token="<unk>", bos_token="<s>", eos_token="</s>")
