"""Tokens, batches, losses and predictions of the three tasks, next to what transformers does by itself."""

from __future__ import annotations

import random
from collections import Counter
from collections.abc import Callable, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from torch import Tensor
from transformers import AutoConfig, set_seed

from shardtune.data.fields import texts
from shardtune.data.sources import Row
from shardtune.errors import DataError
from shardtune.examples import IGNORED, Batch, Encoded, Text, Tokens
from shardtune.model.tokenizer import fit_config, load_tokenizer, train_tokenizer
from shardtune.protocols import Generation
from shardtune.row_fields import Fields
from shardtune.task.causal import Causal
from shardtune.task.classification import Classification
from shardtune.task.seq2seq import Seq2Seq
from shardtune.task.tokens import mask, pad
from skeletons import CLASSES, TASKS, architecture
from small_tokenizers import fast, sentencepiece, template, wordpiece
from tiny import WORDS, rows

PAIRS = [Text(f"line {n}", row["text"], row["summary"]) for n, row in enumerate(rows(40, seed=5))]


# --------------------------------------------------------------------------------------------- tokenizers


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Any]:
    def make(task: str) -> Any:
        folder = tmp_path_factory.mktemp(task)
        train_tokenizer((part for text in PAIRS for part in text[1:]), 300, task, folder)
        return load_tokenizer(str(folder), "right", False)

    return cache(make)


@pytest.fixture(params=["t5-like", "llama-like", "bare", "bert-like", "trained"])
def tokenizer(request: pytest.FixtureRequest, trained: Callable[[str], Any]) -> Any:
    made = {
        "t5-like": lambda: sentencepiece("$A </s>"),
        "llama-like": lambda: sentencepiece("<s> $A"),
        "bare": lambda: sentencepiece("$A"),
        "bert-like": wordpiece,
        "trained": lambda: trained("seq2seq"),
    }[request.param]()
    made.truncation_side = "right"
    yield made
    made.truncation_side = "right"


def tokens(encoded: Sequence[Encoded]) -> list[Tokens]:
    return [Tokens(np.array(e.source, np.int32), np.array(e.target, np.int32)) for e in encoded]


def ids_of(tokenizer: Any, text: str, special: bool = True) -> list[int]:
    return tokenizer(text, add_special_tokens=special)["input_ids"]


def cut(tokenizer: Any, ids: list[int], limit: int) -> list[int]:
    """What must be left of `ids`: special tokens at the ends stay, and the side of the tokenizer goes."""
    if len(ids) <= limit:
        return ids
    special = {tokenizer.bos_token_id, tokenizer.eos_token_id, tokenizer.cls_token_id, tokenizer.sep_token_id}
    first, last = ids[:1] if ids[0] in special else [], ids[-1:] if ids[-1] in special else []
    middle = ids[len(first) : len(ids) - len(last)]
    room = limit - len(first) - len(last)
    kept = middle[:room] if tokenizer.truncation_side == "right" else middle[len(middle) - room :]
    return [*first, *kept, *last]


# ------------------------------------------------------------------------------------------------- encode


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("limit", [3, 8, 20, 1000])
def test_seq2seq_is_cut_to_length(tokenizer: Any, side: str, limit: int) -> None:
    tokenizer.truncation_side = side
    end = tokenizer.eos_token_id
    found = Seq2Seq(tokenizer, limit, limit, 0).encode(PAIRS)
    assert tokenizer.truncation_side == side
    assert any(e.source_cut for e in found) == (limit < 1000)
    for text, e in zip(PAIRS, found, strict=True):
        whole = ids_of(tokenizer, text.source)
        assert list(e.source) == cut(tokenizer, whole, limit)
        assert e.source_cut == (len(whole) > limit)
        assert len(e.target) <= limit
        assert e.target[-1] == end, "the end token survives"
        target = ids_of(tokenizer, text.target)
        target = target if target[-1] == end else [*target, end]
        # A target loses its end, never its beginning: it is written from the left.
        assert list(e.target) == (target if len(target) <= limit else [*target[: limit - 1], end])
        assert e.target_cut == (len(target) > limit)


@pytest.mark.parametrize("side", ["right", "left"])
@pytest.mark.parametrize("limit", [2, 3, 8, 20, 1000])
def test_causal_is_cut_to_length(tokenizer: Any, side: str, limit: int) -> None:
    """A begin token stays, there is no end token between source and target, and one at the end."""
    tokenizer.truncation_side = side
    end = tokenizer.eos_token_id
    found = Causal(tokenizer, limit, limit, whole_text=False).encode(PAIRS)
    for text, e in zip(PAIRS, found, strict=True):
        whole = ids_of(tokenizer, text.source)
        whole = whole[:-1] if whole[-1] == end else whole
        assert list(e.source) == cut(tokenizer, whole, limit)
        assert e.source_cut == (len(whole) > limit)
        target = ids_of(tokenizer, text.target, special=False)
        assert list(e.target) == [*target[: limit - 1], end]
        assert e.target_cut == (len(target) > limit - 1)


@pytest.mark.parametrize("limit", [2, 8, 20, 1000])
def test_whole_texts_are_cut_to_length(tokenizer: Any, limit: int) -> None:
    """All but the first token are targets; a text that is cut has not come to its end, and does not say so."""
    end = tokenizer.eos_token_id
    task = Causal(tokenizer, limit, 7, whole_text=True)
    assert not task.scores_texts
    for text, e in zip(PAIRS, task.encode(PAIRS), strict=True):
        whole = ids_of(tokenizer, text.source)
        whole = [*(whole[:-1] if whole[-1] == end else whole), end]
        assert [*e.source, *e.target] == whole[:limit]
        assert len(e.source) == 1
        assert e.source_cut == (len(whole) > limit)


def test_texts_that_name_special_tokens_and_empty_ones(tokenizer: Any) -> None:
    end = tokenizer.eos_token
    for task in (Causal(tokenizer, 9, 9, whole_text=False), Causal(tokenizer, 9, 9, whole_text=True)):
        found = task.encode([Text("", "", ""), Text("", f"cat{end}", "dog")])
        assert all(len(e.source) and len(e.target) for e in found)
        assert all(e.target[-1] == tokenizer.eos_token_id for e in found)
    assert not Causal(tokenizer, 9, 9, whole_text=False).encode([])
    assert not Seq2Seq(tokenizer, 9, 9, 0).encode([])


@pytest.mark.parametrize("limit", [3, 8, 1000])
@pytest.mark.parametrize("side", ["right", "left"])
def test_classification_is_cut_to_length(tokenizer: Any, limit: int, side: str) -> None:
    tokenizer.truncation_side = side
    labelled = [Text(text.place, text.source, "yes" if "cat" in text.source else "no") for text in PAIRS]
    task = Classification(tokenizer, limit, ["no", "yes"])
    for text, e in zip(labelled, task.encode(labelled), strict=True):
        whole = ids_of(tokenizer, text.source)
        assert list(e.source) == cut(tokenizer, whole, limit)
        assert (e.source_cut, e.target_cut) == (len(whole) > limit, False)
        assert list(e.target) == [int(text.target == "yes")]
    with pytest.raises(DataError, match=r"line 3: label 'maybe' is not in the training data; known are no, yes"):
        task.encode([Text("line 3", "cat", "maybe")])


MARKUP_PROMPTS = {
    "llama": "<|start_header_id|>user<|end_header_id|>\n\n{instruction}\n\n{context}<|eot_id|>"
    "<|start_header_id|>assistant<|end_header_id|>\n\n",
    "qwen": "<|im_start|>user\n{instruction}\n\n{context}<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\n",
}


@pytest.mark.parametrize("name", sorted(MARKUP_PROMPTS))
def test_chat_markup_in_prompts(name: str) -> None:
    """The markup becomes its own tokens, one begin token comes first where the tokenizer has one, none is doubled."""
    llama = name == "llama"
    markup = ["<|begin_of_text|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
    markup = markup if llama else ["<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    tokenizer = Tokenizer(models.BPE())
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE({letter: n for n, letter in enumerate(alphabet)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    tokenizer.add_special_tokens(markup)
    if llama:
        template(tokenizer, "<|begin_of_text|> $A")
    end = "<|eot_id|>" if llama else "<|im_end|>"
    made = fast(tokenizer, eos_token=end, pad_token=end, **({"bos_token": markup[0]} if llama else {}))

    row = {"instruction": "Why?", "context": "", "response": "So."}
    text = list(texts([Row("f:1", row)], Fields(None, MARKUP_PROMPTS[name], "response"), Counter()))
    encoded = Causal(made, 512, 64, whole_text=False).encode(text)[0]
    written = made.decode([*encoded.source, *encoded.target])
    assert written == (
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nWhy?\n\n<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\nSo.<|eot_id|>"
        if llama
        else "<|im_start|>user\nWhy?\n\n<|im_end|>\n<|im_start|>assistant\n<think>\n\n</think>\n\nSo.<|im_end|>"
    )
    names = [made.convert_ids_to_tokens(token) for token in (*encoded.source, *encoded.target)]
    assert Counter(token for token in names if token in markup) == (
        {"<|begin_of_text|>": 1, "<|start_header_id|>": 2, "<|end_header_id|>": 2, "<|eot_id|>": 2}
        if llama
        else {"<|im_start|>": 2, "<|im_end|>": 2, "<think>": 1, "</think>": 1}
    )
    assert names[len(encoded.source) :] == ["S", "o", ".", end]


# -------------------------------------------------------------------------------------------------- batches


def model_and_tokenizer(folder: Path, name: str, trained: Callable[[str], Any], task: str) -> tuple[Any, Any]:
    tokenizer = trained(task)
    config = AutoConfig.from_pretrained(architecture(folder, name))
    fit_config(config, tokenizer, newly_trained=True)
    if task == "classification":
        config.num_labels = 2
    set_seed(0)
    model = CLASSES[task].from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:  # so that predictions differ from one source to the next
                parameter.normal_(std=0.3)
    return model.eval(), tokenizer


def task_for(name: str, kind: str, model: Any, tokenizer: Any) -> Any:
    if kind == "seq2seq":
        return Seq2Seq(tokenizer, 48, 16, model.config.decoder_start_token_id)
    return Causal(tokenizer, 48, 16, whole_text=name == "text") if kind == "causal" else Classification(
        tokenizer, 48, ["no", "pet"])  # fmt: skip


def examples_for(task: Any) -> list[Tokens]:
    if isinstance(task, Classification):
        return tokens(task.encode([text._replace(target="pet" if "cat" in text.source else "no") for text in PAIRS]))
    return tokens(task.encode(PAIRS))


def labels_in_place(batch: Batch) -> Tensor:
    """A column for each of the inputs' (of the decoder's, where there is one)."""
    kept = batch.inputs.get("logits_to_keep")
    if kept is None:
        return batch.labels
    labels = torch.full_like(batch.inputs["input_ids"], IGNORED)
    labels[:, kept + 1] = batch.labels
    return labels


def test_pad_and_mask() -> None:
    assert pad([[1, 2, 3], [4]], 9).tolist() == [[1, 2, 3], [4, 9, 9]]
    assert pad([[1, 2, 3], [4]], 9, left=True).tolist() == [[1, 2, 3], [9, 9, 4]]
    assert mask([[0, 0], [0]]).tolist() == [[1, 1], [1, 0]]
    assert mask([[0, 0], [0]], left=True).tolist() == [[1, 1], [0, 1]]
    assert pad([[1]], 0).dtype == torch.int64


MODELS_AND_TASKS = [(name, TASKS[name]) for name in ("t5", "bart", "llama", "gpt2", "bert", "distilbert")]


@pytest.mark.parametrize(("name", "kind"), MODELS_AND_TASKS)
def test_batches_hold_their_examples(tmp_path: Path, trained: Callable[[str], Any], name: str, kind: str) -> None:
    model, tokenizer = model_and_tokenizer(tmp_path, name, trained, kind)
    task = task_for(name, kind, model, tokenizer)
    examples = examples_for(task)[:9]
    batch: Batch = task.collate(examples)
    ids, seen, labels = batch.inputs["input_ids"], batch.inputs["attention_mask"], labels_in_place(batch)
    assert ids.shape == seen.shape
    assert {value.dtype for value in (*batch.inputs.values(), batch.labels)} == {torch.int64}
    for row, example in enumerate(examples):
        tokens_read = [*example.source, *example.target] if kind == "causal" else list(example.source)
        assert ids[row][seen[row].bool()].tolist() == tokens_read
        assert (ids[row][~seen[row].bool()] == tokenizer.pad_token_id).all()
        assert seen[row].tolist() == sorted(seen[row].tolist(), reverse=True), "padding stands on the right"
        if kind == "classification":
            assert batch.labels[row] == example.target[0]
            continue
        counted = labels[row] != IGNORED
        assert labels[row][counted].tolist() == example.target.tolist()
        if kind == "seq2seq":
            shifted = batch.inputs["decoder_input_ids"][row]
            assert shifted[counted].tolist() == [model.config.decoder_start_token_id, *example.target[:-1]]
            assert (shifted[~counted] == tokenizer.pad_token_id).all()
        else:
            assert ids[row][counted].tolist() == example.target.tolist(), "labels stand where their tokens do"
    targets = sum(len(e.target) for e in examples)
    assert batch.targets == targets == int((batch.labels != IGNORED).sum())
    assert batch.tokens == sum(len(e.source) for e in examples) + (0 if kind == "classification" else targets)
    assert batch.slots == ids.numel() + (batch.labels.numel() if kind == "seq2seq" else 0)
    if kind == "seq2seq":
        theirs = model.prepare_decoder_input_ids_from_labels(labels=batch.labels)
        counted = batch.labels != IGNORED
        assert torch.equal(batch.inputs["decoder_input_ids"][counted], theirs[counted])


@pytest.mark.parametrize(
    ("name", "kind"),
    [*MODELS_AND_TASKS, ("t5-untied", "seq2seq"), ("qwen3", "causal"), ("mistral", "causal"),
     ("roberta", "classification"), ("llama", "classification")],
)  # fmt: skip
def test_loss_is_that_of_transformers(tmp_path: Path, trained: Callable[[str], Any], name: str, kind: str) -> None:
    """On the targets only; summed here, averaged there."""
    model, tokenizer = model_and_tokenizer(tmp_path, name, trained, kind)
    task = task_for(name, kind, model, tokenizer)
    batch = task.collate(examples_for(task)[:9])
    ours_only = ("decoder_input_ids", "logits_to_keep")
    inputs = {key: value for key, value in batch.inputs.items() if key not in ours_only}
    with torch.no_grad():
        ours = task.loss_sum(model, batch)
        theirs = model(**inputs, labels=labels_in_place(batch)).loss * batch.targets
    assert ours.dtype == torch.float32
    assert ours.item() == pytest.approx(theirs.item(), rel=2e-6)


def test_loss_of_whole_texts_is_that_of_transformers(tmp_path: Path, trained: Callable[[str], Any]) -> None:
    model, tokenizer = model_and_tokenizer(tmp_path, "llama", trained, "causal")
    task = task_for("text", "causal", model, tokenizer)
    batch = task.collate(tokens(task.encode(PAIRS))[:9])
    labels = batch.inputs["input_ids"].masked_fill(batch.inputs["attention_mask"] == 0, IGNORED)
    inputs = {key: batch.inputs[key] for key in ("input_ids", "attention_mask")}
    theirs = model(**inputs, labels=labels).loss * batch.targets
    assert task.loss_sum(model, batch).item() == pytest.approx(theirs.item(), rel=2e-6)


@pytest.mark.parametrize(("name", "kind"), MODELS_AND_TASKS)
def test_loss_is_the_sum_over_examples(tmp_path: Path, trained: Callable[[str], Any], name: str, kind: str) -> None:
    """Padding and company change nothing."""
    model, tokenizer = model_and_tokenizer(tmp_path, name, trained, kind)
    task = task_for(name, kind, model, tokenizer)
    examples = examples_for(task)[:9]
    with torch.no_grad():
        together = task.loss_sum(model, task.collate(examples)).item()
        alone = sum(task.loss_sum(model, task.collate([example])).item() for example in examples)
    assert together == pytest.approx(alone, rel=5e-6)


@pytest.mark.parametrize(("name", "kind"), MODELS_AND_TASKS)
def test_blank_batches_teach_nothing(tmp_path: Path, trained: Callable[[str], Any], name: str, kind: str) -> None:
    model, tokenizer = model_and_tokenizer(tmp_path, name, trained, kind)
    task = task_for(name, kind, model, tokenizer)
    batch = task.collate(examples_for(task)[:3]).blank()
    assert (batch.tokens, batch.targets) == (0, 0)
    loss = task.loss_sum(model, batch)
    assert loss.item() == 0.0
    loss.backward()
    gradients = {key: parameter.grad for key, parameter in model.named_parameters()}
    assert any(gradient is not None for gradient in gradients.values())
    for key, gradient in gradients.items():
        assert gradient is None or not gradient.any(), key


# ---------------------------------------------------------------------------------------------- predictions


def alone(model: Any, tokenizer: Any, example: Tokens, **options: Any) -> str:
    """What `generate` itself writes for one source."""
    ids = torch.tensor(np.array(example.source, np.int64))[None]
    written = model.generate(
        input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False,
        pad_token_id=tokenizer.pad_token_id, **options,
    )  # fmt: skip
    new: Tensor = written[0] if model.config.is_encoder_decoder else written[0, ids.shape[1] :]
    return tokenizer.decode(new, skip_special_tokens=True).strip()


@pytest.mark.parametrize("beams", [1, 3])
@pytest.mark.parametrize("name", ["t5", "bart", "llama", "gpt2"])
def test_predictions_are_those_of_each_source_alone(
    tmp_path: Path, trained: Callable[[str], Any], name: str, beams: int
) -> None:
    kind = TASKS[name]
    model, tokenizer = model_and_tokenizer(tmp_path, name, trained, kind)
    task = task_for(name, kind, model, tokenizer)
    examples = examples_for(task)[:8]
    assert len({len(e.source) for e in examples}) > 3, "ragged"
    before = model.generation_config.to_dict()
    with torch.no_grad():
        found = task.predict(model, examples, Generation(9, beams, in_step=False))
        wanted = [alone(model, tokenizer, example, max_new_tokens=9, num_beams=beams) for example in examples]
    assert found == wanted
    assert len(set(found)) > 3
    assert model.generation_config.to_dict() == before


def test_predictions_ignore_sampling_settings(tmp_path: Path, trained: Callable[[str], Any]) -> None:
    """Chat models come with settings for sampling; scores must not depend on luck."""
    model, tokenizer = model_and_tokenizer(tmp_path, "llama", trained, "causal")
    task = task_for("llama", "causal", model, tokenizer)
    examples = examples_for(task)[:4]
    how = Generation(6, 1, in_step=False)
    wanted = task.predict(model, examples, how)
    for key, value in {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": 20, "max_length": 5}.items():
        setattr(model.generation_config, key, value)
    assert task.predict(model, examples, how) == wanted


def test_classes_are_those_of_each_text_alone(tmp_path: Path, trained: Callable[[str], Any]) -> None:
    model, tokenizer = model_and_tokenizer(tmp_path, "bert", trained, "classification")
    task = task_for("bert", "classification", model, tokenizer)
    examples = examples_for(task)
    how = Generation(1, 1, in_step=False)
    with torch.no_grad():
        found = task.predict(model, examples, how)
        assert found == [task.predict(model, [example], how)[0] for example in examples]
        batch = task.collate(examples)
        best = model(**batch.inputs).logits.argmax(-1).tolist()
    assert found == [["no", "pet"][index] for index in best]
    assert set(found) == {"no", "pet"}


def test_random_texts_through_every_tokenizer(tokenizer: Any) -> None:
    """Whatever the text and the limits: within the limits, an end token last, never an empty source."""
    seed = random.randrange(2**32)
    print("seed", seed)
    rng = random.Random(seed)
    for _ in range(40):
        words = [
            rng.choice([*WORDS, "zebra", "漢字", "🙂", "\n", "  ", "", "</s>", "[SEP]"])
            for _ in range(rng.randint(0, 25))
        ]
        some = [Text("", " ".join(words), " ".join(words[::-1])), *rng.sample(PAIRS, 2)]
        source_limit, target_limit = rng.randint(3, 30), rng.randint(2, 30)
        tokenizer.truncation_side = rng.choice(["left", "right"])
        for task in (
            Seq2Seq(tokenizer, source_limit, target_limit, 0),
            Causal(tokenizer, source_limit, target_limit, whole_text=False),
            Causal(tokenizer, source_limit, target_limit, whole_text=True),
        ):
            for e in task.encode(some):
                assert len(e.source) <= source_limit
                assert len(e.target) <= (source_limit if not task.scores_texts else target_limit)
                assert e.target
                assert task.scores_texts is False or e.target[-1] == tokenizer.eos_token_id
                assert e.source or isinstance(task, Seq2Seq)
