"""Virtual tokens: what they begin as, that PEFT alone predicts the same with them, and that layouts agree."""

from __future__ import annotations

import json
from itertools import pairwise
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import peft
import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor, nn
from transformers import AutoConfig

import plain
import run_many
import tiny
from shardtune.assemble.data import read_texts
from shardtune.assemble.export import export
from shardtune.assemble.positions import check_positions
from shardtune.assemble.trained import evaluate, generate
from shardtune.assemble.tunings import make_tuning
from shardtune.config_file import load_config
from shardtune.data.tables import TokenTable
from shardtune.errors import ConfigError
from shardtune.examples import Tokens
from shardtune.strategy.parameters import materialize
from shardtune.task.multitask import Multitask
from shardtune.task.seq2seq import Seq2Seq
from shardtune.tuning.front import put_in_front
from shardtune.tuning.virtual_tokens import Prefix, Prompt, PTuning
from shardtune.tuning_config import PromptConfig
from shardtune.world import World
from skeletons import TASKS, saved, skeleton_of

# peft's own generate() says so of decoders.
pytestmark = pytest.mark.filterwarnings("ignore:Position ids are not supported:UserWarning")

METHODS: dict[str, dict[str, Any]] = {
    "prefix": {"method": "prefix"},
    "projected": {"method": "prefix", "projection": True, "hidden_size": 24},
    "prompt": {"method": "prompt"},
    "text": {"method": "prompt", "text": "red green blue", "virtual_tokens": 5},
    "mlp": {"method": "p_tuning"},
    "lstm": {"method": "p_tuning", "encoder": "lstm", "hidden_size": 12},
    "multitask": {"method": "multitask_prompt"},
    "tasks": {"method": "multitask_prompt", "rank": 2, "virtual_tokens": 3},
}
# Six heads of 4 are not the model's width, and the decoder is deeper than the encoder.
UNEVEN = {**tiny.ARCHITECTURES["t5"], "d_kv": 4, "num_heads": 6, "num_decoder_layers": 3}


class Run(NamedTuple):
    model: str
    method: str
    strategy: str = "single"

    @property
    def name(self) -> str:
        return "-".join(self)

    @property
    def task(self) -> str:
        kind = "bert" if self.model.endswith("_labels") else self.model.partition("_")[0]
        return plain.task_of(kind)


SINGLE = [
    Run("t5", "prompt"), Run("t5", "projected"), Run("t5", "lstm"), Run("t5", "tasks"), Run("llama", "prefix"),
    Run("llama", "text"), Run("llama", "mlp"), Run("llama", "lstm"), Run("llama", "tasks"), Run("t5_uneven", "prefix"),
    Run("bart", "multitask"), Run("gpt2", "prompt"), Run("bert", "prefix"), Run("llama_labels", "prefix"),
    Run("llama_labels", "mlp"),
]  # fmt: skip
TWO_RANKS = [
    Run("t5", "projected", "zero3"), Run("t5", "lstm", "fsdp2"), Run("t5", "prompt", "ddp"),
    Run("llama", "prefix", "fsdp2"), Run("llama", "tasks", "zero3"), Run("llama_labels", "mlp", "zero3"),
]  # fmt: skip
STEPS = 5


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder with all runs."""
    folder = tmp_path_factory.mktemp("prompts")
    for name in dict.fromkeys(run.model for run in SINGLE):
        kind = name.partition("_")[0]
        plain.make_model(folder / "models" / kind, tiny.ARCHITECTURES[kind], 3)
    plain.make_model(folder / "models" / "t5_uneven", UNEVEN, 3)
    run_many.train_both(folder, *([config_of(folder, run) for run in runs] for runs in (SINGLE, TWO_RANKS)))
    return folder


def model_of(folder: Path, run: Run) -> Path:
    return folder / "models" / run.model.removesuffix("_labels")


def config_of(folder: Path, run: Run) -> Path:
    options: dict[str, Any] = {}
    if run.method == "tasks":
        sources = [tiny.write_rows(folder / f"{seed}.jsonl", tiny.rows(20, seed)) for seed in (8, 9)]
        options = {
            "data__train": [str(source) for source in sources],
            "data__validation": None,
            "data__splits": [0.4, 0.6, 0.0],
            "batch__examples": 40,
        }
    return run_many.config(
        folder, run.name, model_of(folder, run), run.task, tuning=METHODS[run.method], strategy__kind=run.strategy,
        duration__steps=STEPS, optimizer__schedule="constant", **options,
    )  # fmt: skip


def loaded(folder: Path, run: Run) -> Any:
    """By peft alone."""
    labels = {"num_labels": 2, "pad_token_id": 0} if run.task == "classification" else {}
    base = plain.AUTO[run.task].from_pretrained(model_of(folder, run), **labels)
    return peft.PeftModel.from_pretrained(base, str(folder / "runs" / run.name / "final")).eval()


class Told(nn.Module):
    """A model of several tasks that is always asked for one."""

    def __init__(self, model: Any, task: int) -> None:
        super().__init__()
        self.model, self.told = model, {"task_ids": torch.tensor([task])}

    def forward(self, **inputs: Any) -> Any:
        return self.model(**inputs, **self.told)

    def generate(self, **inputs: Any) -> Any:
        return self.model.generate(**inputs, **self.told)


@pytest.mark.parametrize("run", SINGLE, ids=lambda run: run.name)
def test_peft_alone_predicts_the_same(done: Path, run: Run) -> None:
    """Row by row and without padding: the run's own predictions were made in batches."""
    model, tokenizer = loaded(done, run), plain.load_tokenizer(model_of(done, run))
    rows = plain.read_rows(done / "runs" / run.name / "predictions" / f"step-{STEPS}-validation.jsonl")
    of_second = {row["text"] for row in tiny.rows(20, 9)} if run.method == "tasks" else set()
    assert rows
    tasks, loss, targets = set(), 0.0, 0
    for row in rows:
        task = int(row["source"] in of_second)
        tasks.add(task)
        asked = Told(model, task) if run.method in ("multitask", "tasks") else model
        given = {"text": row["source"], "summary": row["reference"], "label": row["reference"]}
        assert plain.predict(asked, tokenizer, run.task, given) == row["prediction"]
        batch = plain.batch_of(tokenizer, run.task, [given])
        count = 1 if run.task == "classification" else int((batch["labels"] != -100).sum())
        loss, targets = loss + count * plain.evaluation_loss(asked, run.task, batch), targets + count
    assert run.method != "tasks" or len(tasks) == 2, "the examples of both sources are judged"
    _, evaluations = run_many.metrics(done / "runs" / run.name)
    assert evaluations[-1]["loss"] == pytest.approx(loss / targets, rel=1e-5)


@pytest.mark.parametrize("run", SINGLE, ids=lambda run: run.name)
def test_the_loss_falls(done: Path, run: Run) -> None:
    steps, _ = run_many.metrics(done / "runs" / run.name)
    assert steps[-1]["loss"] < steps[0]["loss"]
    assert all(step["grad_norm"] > 0 for step in steps)


@pytest.mark.parametrize("run", TWO_RANKS, ids=lambda run: run.name)
def test_layouts_agree(done: Path, run: Run) -> None:
    """Losses, gradients, predictions, and in the end the vectors and the network that computes them."""
    alone, spread = done / "runs" / Run(run.model, run.method).name, done / "runs" / run.name
    (steps, _), (reference, _) = run_many.metrics(spread), run_many.metrics(alone)
    for mine, theirs in zip(steps, reference, strict=True):
        assert mine["loss"] == pytest.approx(theirs["loss"], rel=1e-4)
        assert mine["grad_norm"] == pytest.approx(theirs["grad_norm"], rel=1e-3)
    assert steps[0]["loss"] == pytest.approx(reference[0]["loss"], rel=1e-5)
    file = f"step-{STEPS}-validation.jsonl"
    assert plain.read_rows(spread / "predictions" / file) == plain.read_rows(alone / "predictions" / file)
    for name in ("adapter_model.safetensors", "trained_encoder.safetensors"):
        assert (spread / "final" / name).exists() == (alone / "final" / name).exists()
        if (spread / "final" / name).exists():
            found, expected = (load_file(folder / "final" / name) for folder in (spread, alone))
            assert found.keys() == expected.keys()
            for key, tensor in expected.items():
                torch.testing.assert_close(found[key], tensor, rtol=1e-4, atol=1e-4)
                assert bool(tensor.any())


# ------------------------------------------------------------------------------------- what they begin as


def applied(folder: Path, name: str, tuning: Any, task: str | None = None) -> tuple[Any, Any]:
    """A tuned skeleton and its initial values."""
    skeleton = skeleton_of(folder, task or TASKS[name])
    with skeleton.recorder:
        model = tuning.apply(skeleton.model)
    assert all(parameter.is_meta for parameter in model.parameters())
    weights = skeleton.weights(model, 0, torch.float32)
    return model, tuning.initial(model, weights, World(0, 1, 0, torch.device("cpu")))


@pytest.mark.parametrize("name", ["t5", "t5-untied", "bart", "llama", "gpt2"])
def test_a_prompt_from_text_begins_as_peft_would(tmp_path: Path, name: str) -> None:
    folder = saved(tmp_path, name, **({"scale_embedding": True} if name == "bart" else {}))
    plain.make_model(tmp_path / "words", tiny.ARCHITECTURES["t5"], 0)  # for its tokenizer
    tokenizer = plain.load_tokenizer(tmp_path / "words")
    text = PromptConfig.model_validate({"method": "prompt", "text": "the big cat", "virtual_tokens": 7})
    tuning: Any = make_tuning(text, TASKS[name], tokenizer, ["train.jsonl"], 0)
    model, weights = applied(folder, name, tuning)
    base = plain.AUTO[TASKS[name]].from_pretrained(folder)
    theirs = peft.get_peft_model(
        base,
        peft.PromptTuningConfig(
            task_type=tuning.settings(base).task_type, num_virtual_tokens=7, num_transformer_submodules=1,
            prompt_tuning_init="TEXT", prompt_tuning_init_text="the big cat",
            tokenizer_name_or_path=str(tmp_path / "words"),
        ),
    )  # fmt: skip
    expected: Tensor = theirs.prompt_encoder["default"].embedding.weight.detach()  # pyright: ignore
    parameter = "prompt_encoder.default.embedding.weight"
    found = weights.read(parameter, 0, expected.numel())
    torch.testing.assert_close(found.view(expected.shape), expected)
    cuts = [0, 5, 33, 100, expected.numel()]
    parts = [weights.read(parameter, low, high) for low, high in pairwise(cuts)]
    assert torch.equal(torch.cat(parts), found)
    assert weights.read(parameter, 9, 9).numel() == 0
    assert [name for name, p in model.named_parameters() if p.requires_grad] == [parameter]


def test_a_random_prompt_begins_as_tokens_of_the_vocabulary(tmp_path: Path) -> None:
    plain.make_model(tmp_path / "llama", tiny.ARCHITECTURES["llama"], 0)
    tokenizer = plain.load_tokenizer(tmp_path / "llama")
    base = plain.AUTO["causal"].from_pretrained(tmp_path / "llama")
    rows = {tuple(row) for row in base.get_input_embeddings().weight.tolist()}
    found = []
    for seed in (0, 0, 1):
        tuning = make_tuning(PromptConfig(method="prompt"), "causal", tokenizer, ["train.jsonl"], seed)
        _, weights = applied(tmp_path / "llama", "llama", tuning)
        found.append(weights.read("prompt_encoder.default.embedding.weight", 0, 20 * 32).view(20, 32))
        assert all(tuple(row) in rows for row in found[-1].tolist())
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_padding_on_either_side_changes_nothing(tmp_path: Path) -> None:
    """Against peft's own forward, row by row."""
    folder = plain.make_model(tmp_path / "llama", tiny.ARCHITECTURES["llama"], 5)
    tuning = PTuning("causal", 3, "mlp", None, 0.0)
    skeleton = skeleton_of(folder, "causal")
    with skeleton.recorder:
        model: Any = tuning.apply(skeleton.model)
    materialize(model, skeleton.weights(model, 0, torch.float32), torch.device("cpu"))
    model.eval()
    rows = [torch.randint(4, 40, (length,)) for length in (2, 9, 5)]
    with torch.no_grad():
        for left in (False, True):
            ids, mask = torch.zeros(3, 9, dtype=torch.long), torch.zeros(3, 9, dtype=torch.long)
            for index, row in enumerate(rows):
                where = slice(9 - len(row), 9) if left else slice(0, len(row))
                ids[index, where], mask[index, where] = row, 1
            logits = model(input_ids=ids, attention_mask=mask).logits
            assert logits.shape[:2] == (3, 9)
            for index, row in enumerate(rows):
                plainly = type(model).forward(model, input_ids=row[None], attention_mask=torch.ones(1, len(row)))
                if not left:
                    torch.testing.assert_close(logits[index, : len(row)], plainly.logits[0, 3:], rtol=1e-4, atol=1e-5)
                kept = model(input_ids=ids, attention_mask=mask, logits_to_keep=torch.tensor([1, 4])).logits
                torch.testing.assert_close(kept, logits[:, [1, 4]])
            how = {
                "max_new_tokens": 5,
                "do_sample": False,
                "eos_token_id": None,
                "pad_token_id": 0,
                "repetition_penalty": 1.5,
            }
            if left:
                together = model.generate(input_ids=ids, attention_mask=mask, **how)
                for index, row in enumerate(rows):
                    alone = type(model).generate(
                        model, input_ids=row[None], attention_mask=torch.ones(1, len(row), dtype=torch.long), **how
                    )
                    assert together[index, 9:].tolist() == alone[0, len(row) :].tolist()
                beams = model.generate(input_ids=ids, attention_mask=mask, num_beams=3, **how)
                assert beams.shape == together.shape
                assert torch.equal(beams[:, :9], ids)


# ------------------------------------------------------------------------------------------- several tasks


def test_each_example_is_of_its_source() -> None:
    column = np.arange(5, dtype=np.int32)
    ends = np.arange(6, dtype=np.int64)
    table = TokenTable([column, column], [ends, ends], 0, 0)
    assert [table[index].origin for index in range(5)] == [0] * 5
    table.counts = [2, 0, 3]
    assert [table[index].origin for index in range(5)] == [0, 0, 2, 2, 2]


def test_the_model_is_told_the_tasks(tmp_path: Path) -> None:
    tokenizer = plain.load_tokenizer(plain.make_model(tmp_path / "t5", tiny.ARCHITECTURES["t5"], 0))
    task = Multitask(Seq2Seq(tokenizer, 8, 4, 0))
    ids = np.array([5, 6], np.int32)
    examples = [Tokens(ids, ids, 1), Tokens(ids, ids), Tokens(ids, ids, 3)]
    assert task.collate(examples).inputs["task_ids"].tolist() == [1, 0, 3]
    assert task.collate(examples).blank().inputs["task_ids"].tolist() == [1, 0, 3]


# ------------------------------------------------------------------------------------ after the run, refusals


JUDGED = [Run("t5", "lstm"), Run("llama", "tasks"), Run("llama", "prefix"), Run("bert", "prefix")]


@pytest.mark.parametrize("run", JUDGED, ids=lambda run: run.name)
def test_results_are_judged_and_tried(done: Path, run: Run, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    path = config_of(done, run)
    config = load_config(path, [])
    folder = done / "runs" / run.name
    _, evaluations = run_many.metrics(folder)
    table = evaluate(config, read_texts(config), folder / "final", "validation", "final")
    assert f"{evaluations[-1]['loss']:.4f}" in table
    rows = plain.read_rows(folder / "predictions" / f"step-{STEPS}-validation.jsonl")
    if run.method != "tasks":
        assert list(generate(config, folder / "final", [row["source"] for row in rows], False)) == [
            r["prediction"] for r in rows
        ]
    assert len(list(generate(config, folder / "final", ["red cat", "old dog"], False))) == 2


def test_virtual_tokens_are_not_merged(done: Path, tmp_path: Path) -> None:
    run = Run("llama", "prefix")
    with pytest.raises(ConfigError, match="prefix trains vectors in front of the text"):
        export(
            load_config(config_of(done, run), []),
            done / "runs" / run.name,
            done / "runs" / run.name / "final",
            tmp_path / "out",
            merge=True,
            base="original",
        )


def test_the_network_lies_beside_the_result(done: Path) -> None:
    """And says what the vectors are; the adapter has just these."""
    final = done / "runs" / Run("t5", "projected").name / "final"
    assert set(run_many.adapter(final.parent)) == {"prompt_embeddings"}
    assert (final / "trained_encoder.safetensors").exists()
    assert json.loads((final / "adapter_config.json").read_text())["inference_mode"] is True
    assert not (done / "runs" / Run("llama", "prefix").name / "final" / "trained_encoder.safetensors").exists()


@pytest.mark.parametrize(
    ("options", "says"),
    [
        ({"tuning": METHODS["mlp"], "data__batching": "packed"}, "data.batching: packed examples would share"),
        ({"tuning": METHODS["prefix"], "model__recompute": "full"}, "model.recompute: a prefix is kept where"),
        ({"tuning": METHODS["multitask"], "data__streaming": True, "data__train": ["a.jsonl", "b.jsonl"]},
         "data.streaming: a stream does not tell the sources apart"),
        ({"tuning": {"method": "pissa", "from": "runs/first/final"}}, "use tuning.method: lora"),
        ({"tuning": {"method": "prompt", "rank": 4}}, "tuning.rank"),
    ],
)  # fmt: skip
def test_what_cannot_be_combined(tmp_path: Path, options: dict[str, Any], says: str) -> None:
    with pytest.raises(ConfigError) as caught:
        load_config(tiny.tiny_config(tmp_path, "t5", **options), [])
    assert says in str(caught.value)


@pytest.mark.parametrize(
    ("model", "method", "fits"),
    [
        ("gpt2", "prompt", 64),
        ("gpt2", "prefix", 64),
        ("bart", "mlp", 108),
        ("bert", "prompt", 108),
        ("llama", "mlp", 0),
    ],
)
def test_virtual_tokens_have_positions_too(tmp_path: Path, model: str, method: str, fits: int) -> None:
    path = tiny.tiny_config(tmp_path, model, tuning=METHODS[method], task__max_source_tokens=fits or 500)
    if model == "gpt2":
        path = tiny.tiny_config(
            tmp_path, model, tuning=METHODS[method], task__max_source_tokens=fits, task__max_target_tokens=44
        )
    architecture = AutoConfig.from_pretrained(tmp_path / model)
    check_positions(load_config(path, []), architecture)
    if fits:
        with pytest.raises(ConfigError, match=r"with the 20 of tuning.virtual_tokens are more than the 128 positions"):
            check_positions(load_config(path, [f"task.max_source_tokens={fits + 1}"]), architecture)


def test_models_that_cannot_be_tuned_so(tmp_path: Path) -> None:
    t5 = skeleton_of(saved(tmp_path / "t5", "t5"), "classification", pretrained=False)
    with pytest.raises(ConfigError, match=r"tuning.method: T5ForSequenceClassification finds its end token"):
        Prompt("classification", 3, [1]).apply(t5.model)
    distilbert = skeleton_of(saved(tmp_path / "d", "distilbert"), "classification", pretrained=False)
    with pytest.raises(ConfigError, match=r"takes no keys and values from outside"):
        Prefix("classification", 3, False, None).apply(distilbert.model)


def test_other_methods_are_left_alone(tmp_path: Path) -> None:
    base = plain.AUTO["causal"].from_pretrained(plain.make_model(tmp_path / "m", tiny.ARCHITECTURES["llama"], 0))
    model = peft.get_peft_model(base, peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    put_in_front(model)  # pyright: ignore[reportArgumentType]
    assert "forward" not in vars(model)
