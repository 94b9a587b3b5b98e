"""What a model may end in: the heads of transformers that a task can ask for, by name."""

from __future__ import annotations

from typing import NamedTuple


class Head(NamedTuple):
    """One of them."""

    auto_class: str
    """The class of transformers that makes a model with it."""
    peft_task: str
    """What PEFT calls it."""
    is_new: bool
    """Whether pretrained files may come without it: it is then drawn at random, and trained in full by every method."""
    models: str
    """What has it, in words."""


HEADS = {
    "seq2seq": Head("AutoModelForSeq2SeqLM", "SEQ_2_SEQ_LM", False, "an encoder-decoder such as t5 or bart"),
    "causal": Head("AutoModelForCausalLM", "CAUSAL_LM", False, "a decoder such as llama, qwen3, mistral or gpt2"),
    "classification": Head(
        "AutoModelForSequenceClassification", "SEQ_CLS", True, "bert, distilbert, roberta or a decoder"
    ),
    "token_classification": Head(
        "AutoModelForTokenClassification", "TOKEN_CLS", True, "bert, distilbert, roberta or a decoder"
    ),
    "question_answering": Head(
        "AutoModelForQuestionAnswering", "QUESTION_ANS", True, "bert, distilbert, roberta or a decoder"
    ),
}
