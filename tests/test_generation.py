"""What a model writes: options as transformers knows them, draws that depend on the example alone, stops."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from scipy.stats import chisquare
from torch.nn.functional import log_softmax
from transformers import PreTrainedModel

import plain
import tiny
from layouts import ARCHITECTURES
from shardtune.examples import Text, Tokens
from shardtune.fused.head import after_head, fuse_head
from shardtune.protocols import Generation, Task
from shardtune.task.causal import Causal
from shardtune.task.generation import Drawn, Stopped
from shardtune.task.multitask import Multitask
from shardtune.task.seq2seq import Seq2Seq

SEED = 411
MODELS = {
    "t5": {**ARCHITECTURES["t5"], "tie_word_embeddings": False, "initializer_factor": 1.5},
    "llama": {**ARCHITECTURES["llama"], "initializer_range": 0.2},
}
WORDS = 24
"""A vocabulary without tokens that write nothing but the special ones."""
ROWS = tiny.rows(9, SEED)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("models")
    return {name: plain.make_model(folder / name, of, SEED, vocabulary=WORDS) for name, of in MODELS.items()}


def made(folders: dict[str, Path], name: str) -> tuple[Any, Any, Task, list[Tokens]]:
    """Model, tokenizer, task and examples."""
    model = plain.AUTO[plain.task_of(name)].from_pretrained(folders[name]).eval()
    tokenizer = plain.load_tokenizer(folders[name])
    task: Task = Seq2Seq(tokenizer, 20, 6, 0) if name == "t5" else Causal(tokenizer, 20, 6, whole_text=False)
    texts = [Text("", row["text"], row["summary"]) for row in ROWS]
    encoded = task.encode(texts)
    return model, tokenizer, task, [
        Tokens(np.array(e.source), np.array(e.target), number=number) for number, e in enumerate(encoded)
    ]  # fmt: skip


def written(model: Any, tokenizer: Any, examples: Sequence[Tokens], **options: Any) -> list[str]:
    """By transformers, each example alone."""
    texts = []
    for example in examples:
        ids = torch.tensor(example.source[None])
        with torch.no_grad():
            row = model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), do_sample=False, **options)[0]
        new = row if model.config.is_encoder_decoder else row[ids.shape[1] :]
        texts.append(tokenizer.decode(new, skip_special_tokens=True).strip())
    return texts


@torch.no_grad()
def predicted(task: Task, model: PreTrainedModel, examples: Sequence[Tokens], how: Generation) -> list[str]:
    return task.predict(model, examples, how)


@pytest.mark.parametrize("name", MODELS)
@pytest.mark.parametrize(
    "options",
    [
        {"min_new_tokens": 9},
        {"no_repeat_ngram": 2},
        {"beams": 3, "length_penalty": -2.0, "no_repeat_ngram": 2},
        {"beams": 3, "length_penalty": 3.0, "min_new_tokens": 4},
    ],
)
def test_options_are_those_of_transformers(folders: dict[str, Path], name: str, options: dict[str, Any]) -> None:
    model, tokenizer, task, examples = made(folders, name)
    theirs = {"no_repeat_ngram": "no_repeat_ngram_size", "beams": "num_beams"}
    wanted = written(
        model, tokenizer, examples, max_new_tokens=11, **{theirs.get(key, key): given for key, given in options.items()}
    )
    assert predicted(task, model, examples, Generation(11, **options)) == wanted
    assert wanted != predicted(task, model, examples, Generation(11, beams=options.get("beams", 1)))


# ---------------------------------------------------------------------------------------------- draws


@pytest.mark.parametrize("name", MODELS)
def test_draws_depend_on_the_example_alone(folders: dict[str, Path], name: str) -> None:
    model, _, task, examples = made(folders, name)
    how = Generation(8, temperature=6.0, top_k=20, top_p=0.95, seed=5)
    together = predicted(task, model, examples, how)
    assert len(set(together)) > 5
    assert predicted(task, model, examples, how) == together
    assert [predicted(task, model, [example], how)[0] for example in examples] == together
    turned = predicted(task, model, examples[::-1], how)
    assert turned[::-1] == together
    assert predicted(task, model, examples, how._replace(seed=6)) != together
    same_source = [examples[0]._replace(number=number) for number in range(6)]
    assert len(set(predicted(task, model, same_source, how))) > 3


@pytest.mark.parametrize(("temperature", "top_k", "top_p"), [(1.0, None, None), (0.7, 5, None), (2.0, None, 0.6)])
def test_frequencies_are_the_models_probabilities(temperature: float, top_k: int | None, top_p: float | None) -> None:
    """Of many draws of one token, at two places; and what is drawn at one tells nothing of the other."""
    draws, size = 20_000, 12
    logits = torch.from_numpy(np.random.default_rng(3).normal(0, 1.5, size)).float()
    wanted = torch.softmax(logits / temperature, 0).double()
    order = wanted.argsort(descending=True)
    if top_k is not None:
        wanted[order[top_k:]] = 0
    if top_p is not None:  # as many as are needed to reach it
        wanted[order[wanted[order].cumsum(0) - wanted[order] >= top_p]] = 0
    wanted /= wanted.sum()
    how = Generation(1, temperature=temperature, top_k=top_k, top_p=top_p, seed=17)
    drawn = Drawn(how, range(draws), begun=3)
    places = []
    for length in (3, 4):
        ids: Any = torch.zeros(draws, length, dtype=torch.int64)
        scores: Any = logits.expand(draws, size)
        places.append(drawn(ids, scores).argmax(-1).numpy())
    possible = (wanted > 0).numpy()
    for found in places:
        counts = np.bincount(found, minlength=size)
        assert not counts[~possible].any()
        assert chisquare(counts[possible], wanted.numpy()[possible] * draws).pvalue > 0.001
    agreeing = np.mean(places[0] == places[1])
    assert agreeing == pytest.approx(float((wanted**2).sum()), abs=0.02)


def test_what_is_ruled_out_is_not_drawn() -> None:
    scores: Any = torch.tensor([[0.0, -torch.inf, 1.0]]).expand(200, 3)
    ids: Any = torch.zeros(200, 1, dtype=torch.int64)
    found = Drawn(Generation(1, temperature=9.0), range(200), 1)(ids, scores)
    assert set(found.argmax(-1).tolist()) == {0, 2}
    assert torch.isneginf(found[:, 1]).all()


# ---------------------------------------------------------------------------------------------- stops


@pytest.mark.parametrize("beams", [1, 2])
@pytest.mark.parametrize("name", MODELS)
def test_texts_end_before_a_stop(folders: dict[str, Path], name: str, beams: int) -> None:
    model, _, task, examples = made(folders, name)
    how = Generation(12, beams)
    whole = predicted(task, model, examples, how)
    words = [text.split() for text in whole]
    stop = (max((word for text in words for word in text[1:]), key=lambda word: sum(word in text for text in words)),)
    found = predicted(task, model, examples, how._replace(stop=stop))
    assert found != whole
    assert not any(stop[0] in text for text in found)
    if beams == 1:
        assert found == [text.partition(stop[0])[0].strip() for text in whole]


@pytest.mark.parametrize("name", MODELS)
def test_writing_ends_once_every_row_has_stopped(folders: dict[str, Path], name: str) -> None:
    model, tokenizer, task, examples = made(folders, name)
    counted: list[int] = []
    how = Generation(40, min_new_tokens=40, counts=counted.append)
    texts = [text.split() for text in predicted(task, model, examples, how)]
    index = next(index for index, words in enumerate(texts) if len(set(words[:20])) > 1)
    words = texts[index]
    word = next(word for word in words if word != words[0])
    found = predicted(task, model, [examples[index]], how._replace(stop=("no such", word)))
    assert [text.split() for text in found] == [words[: words.index(word)]]
    assert 20 < counted[0] <= 40 * len(examples)
    assert 2 <= counted[1] < 30
    ids = torch.tensor([tokenizer(words, add_special_tokens=False)["input_ids"] for words in ("red cat", "cat red")])
    rows: Any = torch.cat([torch.full((2, 1), 7), ids], 1)
    assert Stopped(["cat red"], tokenizer, 1)(rows, rows).tolist() == [False, True]
    assert Stopped(["red"], tokenizer, 2)(rows, rows).tolist() == [False, True]


# ---------------------------------------------------------------------------------------------- losses


@pytest.mark.parametrize("fused", [False, True])
@pytest.mark.parametrize("name", MODELS)
def test_losses_of_examples_add_up(folders: dict[str, Path], name: str, fused: bool) -> None:
    model, _, task, examples = made(folders, name)
    if fused:
        assert fuse_head(model.get_output_embeddings(), after_head(model)) == (1, {})
    batch = task.collate(examples)
    with torch.no_grad():
        found = task.losses(model, batch)
        assert found.shape == (len(examples),)
        assert found.dtype == torch.float32
        assert found.sum().item() == pytest.approx(task.loss_sum(model, batch).item(), rel=1e-6)
        assert task.losses(model, batch.blank()).tolist() == [0.0] * len(examples)
        alone = [task.losses(model, task.collate([example])).item() for example in examples]
    assert found.tolist() == pytest.approx(alone, rel=1e-5)
    assert [task.targets(example) for example in examples] == [len(example.target) for example in examples]
    assert sum(map(task.targets, examples)) == batch.targets
    example, labels = examples[0], torch.tensor(examples[0].target)
    with torch.no_grad():
        if name == "t5":
            logits = model(input_ids=torch.tensor(example.source[None]), labels=labels[None]).logits[0]
        else:
            joined = np.concatenate((example.source, example.target))
            logits = model(torch.tensor(joined[None])).logits[0, len(example.source) - 1 : -1]
    wanted = -log_softmax(logits.double(), -1).gather(1, labels[:, None].long()).sum()
    assert found[0].item() == pytest.approx(wanted.item(), rel=1e-5)


def test_tokens_that_are_read_only_are_no_targets(folders: dict[str, Path]) -> None:
    _, _, task, _ = made(folders, "llama")
    example = Tokens(np.array([2, 5]), np.array([7, ~8, 9, ~1, 1]))
    assert task.targets(example) == task.collate([example]).targets == 3


def test_references_and_predictions_are_texts_as_they_are(folders: dict[str, Path]) -> None:
    for name in MODELS:
        _, _, task, _ = made(folders, name)
        for one in (task, Multitask(task)):
            text = Text("f:1", "a", "b")
            assert one.references(text) == ["b"]
            assert one.as_written([text, text], ["x", "y"]) == ["x", "y"]
