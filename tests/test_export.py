"""`export --merge`: one model that computes what base and adapter did, or none at all."""

from __future__ import annotations

import random
import shutil
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch import Tensor

import plain
import run_many
import tiny
from shardtune import cli
from shardtune.assemble import export as exporting

pytestmark = [  # peft's own warnings when it loads what it has saved
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
    pytest.mark.filterwarnings("ignore:The following rank_pattern keys:RuntimeWarning"),
]
STEPS = 3
LLAMA = {**tiny.ARCHITECTURES["llama"], "hidden_size": 64, "intermediate_size": 96}
MODELS: dict[str, dict[str, Any]] = {
    "llama": LLAMA,
    "llama-tied": {**LLAMA, "tie_word_embeddings": True},
    "llama-bf16": LLAMA,
    "t5": {**tiny.ARCHITECTURES["t5"], "d_model": 64, "feed_forward_proj": "gated-gelu"},
    "t5-untied": {**tiny.ARCHITECTURES["t5"], "tie_word_embeddings": False},
    "gpt2": tiny.ARCHITECTURES["gpt2"],
    "bert": tiny.ARCHITECTURES["bert"],
}


class Run(NamedTuple):
    model: str
    tuning: dict[str, Any]
    label: str = ""

    @property
    def method(self) -> str:
        return self.tuning["method"]

    @property
    def name(self) -> str:
        return f"{self.method}-{self.model}{self.label}".replace("+", "-plus")

    @property
    def task(self) -> str:
        return plain.task_of(MODELS[self.model]["model_type"])


def named(runs: list[Run]) -> Any:
    return pytest.mark.parametrize("run", runs, ids=[run.name for run in runs])


ON_LLAMA = (
    "lora",
    "rslora",
    "lora+",
    "dora",
    "pissa",
    "eva",
    "adalora",
    "ia3",
    "vera",
    "loha",
    "lokr",
    "oft",
    "ln_tuning",
)
MERGED = [
    *(Run("llama", {"method": method}) for method in ON_LLAMA),
    *(Run("t5", {"method": method}) for method in ("dora", "ia3", "oft", "ln_tuning")),
    *(Run("gpt2", {"method": method}) for method in ("lora", "ia3")),
    Run("t5-untied", {"method": "lora"}), Run("llama-tied", {"method": "lora"}), Run("bert", {"method": "lora"}),
]  # fmt: skip
ROUNDED = Run("llama-bf16", {"method": "lora"})
QUANTIZED = [
    Run("llama", {"method": "qlora"}),
    Run("t5", {"method": "qlora", "quantization": "fp4"}, "-fp4"),
    Run("llama", {"method": "qdora", "quantization": "int8"}, "-int8"),
]
LOFTQ = Run("llama", {"method": "loftq"})
PROMPTS = [Run("llama", {"method": method}) for method in ("prefix", "prompt", "p_tuning", "multitask_prompt")]
TIED = Run("llama-tied", {"method": "lora", "targets": ["lm_head"]}, "-output")
ALL = [*MERGED, ROUNDED, *QUANTIZED, LOFTQ, *PROMPTS, TIED]


class Done:
    def __init__(self, folder: Path, seed: int) -> None:
        self.folder, self.seed = folder, seed
        for name, settings in MODELS.items():
            dtype = torch.bfloat16 if name.endswith("bf16") else torch.float32
            plain.make_model(folder / name, settings, seed, dtype)
        configs = [
            run_many.config(
                folder, run.name, folder / run.model, run.task, tuning=run.tuning, duration__steps=STEPS,
                optimizer__lr=1e-2,
            )
            for run in ALL
        ]  # fmt: skip
        run_many.train(folder, configs, 1)

    def path(self, run: Run) -> Path:
        return self.folder / "runs" / run.name

    def base(self, run: Run) -> Any:
        return plain.AUTO[run.task].from_pretrained(self.folder / run.model, dtype=torch.float32)

    def beside(self, run: Run) -> Tensor:
        """Logits of the adapter beside the base, as transformers and peft load them."""
        return self.logits(run, PeftModel.from_pretrained(self.base(run), str(self.path(run) / "final")))

    def logits(self, run: Run, model: Any) -> Tensor:
        rows = plain.read_rows(self.folder / "validation.jsonl")
        batch = plain.batch_of(plain.load_tokenizer(self.folder / run.model), run.task, rows)
        bare = model.get_base_model() if isinstance(model, PeftModel) else model  # AdaLoRA's fails
        with torch.no_grad():
            return bare.eval()(**batch).logits

    def predictions(self, run: Run, model: Any) -> list[str]:
        tokenizer = plain.load_tokenizer(self.folder / run.model)
        rows = plain.read_rows(self.folder / "validation.jsonl")
        return [plain.predict(model, tokenizer, run.task, row) for row in rows]

    def written(self, run: Run) -> list[str]:
        lines = plain.read_rows(self.path(run) / "predictions" / f"step-{STEPS}-validation.jsonl")
        return [line["prediction"] for line in lines]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    return Done(tmp_path_factory.mktemp("export"), random.randrange(2**31))


class Export:
    """The command, in this process."""

    def __init__(self, folder: Path, capsys: pytest.CaptureFixture[str]) -> None:
        self.folder, self.capsys = folder, capsys

    def __call__(self, run: Path, *options: str) -> tuple[int, Path, str]:
        """Its exit code, the folder that it was to write, and what it said."""
        out = self.folder / "out"
        code = cli.main(["export", "--run", str(run), "--out", str(out), *options])
        said = self.capsys.readouterr()
        return code, out, said.out + said.err

    def nothing_is_left(self) -> bool:
        return not list(self.folder.iterdir())


@pytest.fixture
def export(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> Export:
    (tmp_path / "exports").mkdir()
    return Export(tmp_path / "exports", capsys)


def load(run: Run, folder: Path, **options: Any) -> Any:
    model, info = plain.AUTO[run.task].from_pretrained(folder, output_loading_info=True, **options)
    assert not any(info.values()), info
    return model


def same(one: Tensor, other: Tensor, share: float = 1e-5) -> bool:
    return bool((one - other).abs().max() <= share * other.abs().max())


@named(MERGED)
def test_merged_into_the_base(done: Done, export: Export, run: Run) -> None:
    code, out, said = export(done.path(run), "--merge")
    assert code == 0, said
    assert f"step-{STEPS}-validation.jsonl" in said
    assert "merged in float32" in said
    model = load(run, out)
    beside = done.beside(run)
    assert same(done.logits(run, model), beside), done.seed
    assert not same(done.logits(run, done.base(run)), beside, 1e-4), "or nothing would have been merged"
    assert done.predictions(run, model) == done.written(run), done.seed
    assert not (out / "adapter_config.json").exists()
    assert [path.name for path in export.folder.iterdir()] == ["out"]


def test_stored_as_the_base_was(done: Done, export: Export) -> None:
    """Rounded once: the float32 sum of the base and the update."""
    code, out, said = export(done.path(ROUNDED), "--merge")
    assert code == 0, said
    assert "as stored in bfloat16" in said
    stored = load_file(out / "model.safetensors")
    assert {tensor.dtype for tensor in stored.values()} == {torch.bfloat16}
    tuned: Any = PeftModel.from_pretrained(done.base(ROUNDED), str(done.path(ROUNDED) / "final"))
    expected = tuned.merge_and_unload().state_dict()
    assert all(torch.equal(tensor, expected[name].bfloat16()) for name, tensor in stored.items())


@named(QUANTIZED)
def test_merged_into_the_original_of_a_quantized_base(done: Done, export: Export, run: Run) -> None:
    code, out, said = export(done.path(run), "--merge")
    assert code == 0, said
    merged = done.logits(run, load(run, out))
    assert same(merged, done.beside(run)), done.seed
    kind = run.tuning.get("quantization", "nf4")
    informed = next(line for line in said.splitlines() if f"the model as it was trained, on the {kind} weights" in line)
    assert float(informed.split()[0]) > 1e-3, "quantization moves logits"


@named([*QUANTIZED, LOFTQ])
def test_merged_into_what_the_quantized_base_stands_for(done: Done, export: Export, run: Run) -> None:
    """What the run itself predicted, in full precision."""
    code, out, said = export(done.path(run), "--merge", "--base", "dequantized")
    assert code == 0, said
    if run.tuning.get("quantization") != "int8":  # whose inputs are rounded, too
        assert done.predictions(run, load(run, out)) == done.written(run), done.seed
        informed = next(line for line in said.splitlines() if "the model as it was trained" in line)
        assert float(informed.split()[0]) < 1e-4, informed
    original = load_file(done.folder / run.model / "model.safetensors")
    stored = load_file(out / "model.safetensors")
    assert stored.keys() == original.keys()
    norms = [name for name in stored if "norm" in name]
    assert norms
    assert all(torch.equal(stored[name], original[name]) for name in norms)


@named(PROMPTS)
def test_vectors_in_front_cannot_be_merged(done: Done, export: Export, run: Run) -> None:
    code, _, said = export(done.path(run), "--merge")
    assert code == 2
    assert f"command line --merge: {run.method} trains vectors in front of the text" in said
    assert export.nothing_is_left()


@pytest.mark.parametrize(
    ("run", "options", "said"),
    [
        (MERGED[0], ["--merge", "--base", "dequantized"], "command line --base: lora does not quantize the base"),
        (MERGED[0], ["--base", "dequantized"], "command line --base: only with --merge"),
        (LOFTQ, ["--merge"], "command line --base: loftq begins as the correction of the 4-bit weights' error"),
    ],
    ids=["no quantized base", "no merge", "loftq"],
)  # fmt: skip
def test_choices_of_the_base(done: Done, export: Export, run: Run, options: list[str], said: str) -> None:
    code, _, words = export(done.path(run), *options)
    assert code == 2
    assert said in words
    assert export.nothing_is_left()


def test_a_merge_that_does_not_agree(done: Done, export: Export) -> None:
    """The update of an output layer, merged, would be one of the embeddings tied to it."""
    code, _, said = export(done.path(TIED), "--merge")
    assert code == 5, said
    assert "the adapter does not act as beside it: on 4 examples" in said
    assert "Nothing was written" in said
    assert export.nothing_is_left()


def test_a_stored_merge_that_does_not_agree(done: Done, export: Export, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is judged is what was written."""
    loaded = exporting.load_model

    def damaged(folder: str, task: str, dtype: torch.dtype) -> Any:
        file = Path(folder) / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("q_proj.weight"))
        save_file({**tensors, name: tensors[name] * 2}, file, metadata={"format": "pt"})
        return loaded(folder, task, dtype)

    monkeypatch.setattr(exporting, "load_model", damaged)
    code, _, said = export(done.path(MERGED[0]), "--merge")
    assert code == 5, said
    assert "stored in float32, the merged model does not act as the tuned one" in said
    assert export.nothing_is_left()


def test_values_that_are_not_finite_never_agree() -> None:
    good = exporting.Difference(1e-6, 10.0)
    assert good.within(1e-4)
    assert not good._replace(largest=float("nan")).within(1e9)
    assert not good._replace(of=float("inf")).within(1e9)


def test_without_predictions_random_tokens_are_compared(done: Done, export: Export, tmp_path: Path) -> None:
    for run in (MERGED[0], next(run for run in MERGED if run.task == "classification"), MERGED[-4]):
        folder = tmp_path / run.name
        shutil.copytree(done.path(run), folder)
        shutil.rmtree(folder / "predictions")
        code, out, said = export(folder, "--merge")
        assert code == 0, said
        assert "on random tokens" in said
        shutil.rmtree(out)


def test_an_adapter_that_lacks_a_tensor(done: Done, export: Export, tmp_path: Path) -> None:
    """peft only warns, and then base would be compared with base."""
    run = shutil.copytree(done.path(MERGED[0]), tmp_path / "run")
    file = run / "final" / "adapter_model.safetensors"
    tensors = load_file(file)
    del tensors[min(tensors)]
    save_file(tensors, file, metadata={"format": "pt"})
    code, out, said = export(run, "--merge")
    assert (code, out.exists()) == (2, False), said
    assert "the adapter is not whole: Found missing adapter keys" in said


def test_the_folder_is_there_already(done: Done, export: Export) -> None:
    (export.folder / "out").mkdir()
    code, out, said = export(done.path(MERGED[0]), "--merge")
    assert code == 2
    assert f"{out} is there already" in said
