"""A model that is split over the ranks is never whole on one of them, not even while it is loaded."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file
from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

from launching import BIN, REPOSITORY, run
from tiny import ARCHITECTURES

SCRIPT = REPOSITORY / "tests" / "ranks" / "loading_memory.py"
# About 236 MB in float32, each layer at most 17 MB, and beside the layers less than that.
SIZES = {
    "t5": {"d_model": 512, "d_kv": 64, "d_ff": 2048, "num_layers": 8, "num_decoder_layers": 8, "num_heads": 8},
    "llama": {
        "hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 14, "num_attention_heads": 8,
        "num_key_value_heads": 8,
    },
}  # fmt: skip
CLASSES = {"t5": AutoModelForSeq2SeqLM, "llama": AutoModelForCausalLM}


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> list[str]:
    """Arguments of the script: each architecture with random weights, and with weights in two files."""
    folder = tmp_path_factory.mktemp("models")
    for name, sizes in SIZES.items():
        for path, config in (
            (folder / name, ARCHITECTURES[name] | sizes),
            (folder / f"{name}-tiny", ARCHITECTURES[name]),
        ):
            path.mkdir()
            (path / "config.json").write_text(json.dumps(config))
        _write_weights(folder / name, name)
    return [f"{folder / name}:{weights}" for name in SIZES for weights in ("random", "pretrained")]


def _write_weights(folder: Path, name: str) -> None:
    with torch.device("meta"):
        model = CLASSES[name].from_config(AutoConfig.from_pretrained(folder))
    shapes = [(key, parameter.shape) for key, parameter in model.named_parameters()]
    places = {}
    for index, part in enumerate((shapes[::2], shapes[1::2]), 1):
        file = f"model-{index:05}-of-00002.safetensors"
        save_file({key: torch.rand(shape) for key, shape in part}, folder / file, metadata={"format": "pt"})
        places |= dict.fromkeys([key for key, _ in part], file)
    index_text = json.dumps({"metadata": {}, "weight_map": places})
    (folder / "model.safetensors.index.json").write_text(index_text)


@pytest.mark.parametrize("kind", ["single", "fsdp2", "zero3"])
def test_peak_while_loading(kind: str, models: list[str], tmp_path: Path) -> None:
    ranks = 1 if kind == "single" else 2
    start = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", str(ranks)]
    done = run([*start, str(SCRIPT), kind, *models], tmp_path)
    assert done.code == 0, done.said
    measured = [json.loads(line) for line in done.out.splitlines() if line.startswith("{")]
    assert len(measured) == len(models)
    for line in measured:
        shares = [peak / line["bytes"] for peak in line["peaks"]]
        print(kind, line["model"], line["weights"], [f"{share:.3f}" for share in shares])
        if kind == "single":
            assert 0.95 < shares[0] < 1.1, line  # the measure works
        else:
            assert len(shares) == ranks
            assert max(line["peaks"]) < line["bytes"] / ranks + line["layer"], line
