"""A 4-bit model is quantized while it is read: nowhere are its full-precision weights, nor a copy for each rank."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from launching import BIN, REPOSITORY, run
from tiny import ARCHITECTURES

SCRIPT = REPOSITORY / "tests" / "ranks" / "loading_quantized.py"
ROOM = 300_000_000
"""Bytes beside the quantized model, over all ranks."""
LARGE = {
    **ARCHITECTURES["llama"], "hidden_size": 1024, "intermediate_size": 4096, "num_hidden_layers": 30,
    "num_attention_heads": 8, "num_key_value_heads": 8,
}  # fmt: skip
SMALL = {**LARGE, "hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 2}


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder of 2 GB in float32, and a small one to begin with."""
    folder = tmp_path_factory.mktemp("models") / "llama"
    for path, config in ((folder, LARGE), (folder.with_name("llama-tiny"), SMALL)):
        path.mkdir()
        (path / "config.json").write_text(json.dumps(config))
        _write_weights(path)
    return folder


def _write_weights(folder: Path) -> None:
    """One safetensors file, written without holding the model: one block of random numbers again and again."""
    with torch.device("meta"):
        made = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(folder))
    header, at = {}, 0
    for name, parameter in made.named_parameters():
        end = at + 4 * parameter.numel()
        header[name] = {"dtype": "F32", "shape": list(parameter.shape), "data_offsets": [at, end]}
        at = end
    text = json.dumps(header).encode()
    block = torch.randn(1 << 20).numpy().tobytes()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        for done in range(0, at, len(block)):
            file.write(block[: at - done])


@pytest.mark.timeout(600)
@pytest.mark.parametrize("kind", ["fsdp2", "zero3"])
def test_peak_while_loading(kind: str, model: Path, tmp_path: Path) -> None:
    start = [str(BIN / "torchrun"), "--standalone", "--nproc_per_node", "2"]
    done = run([*start, str(SCRIPT), kind, str(model)], tmp_path, timeout=500)
    assert done.code == 0, done.said
    measured = json.loads(next(line for line in done.out.splitlines() if line.startswith("{")))
    whole = (model / "model.safetensors").stat().st_size
    print(kind, measured)
    assert whole > 2_000_000_000
    assert measured["size"] < whole / 7, "4 bits of 32, and the scales"
    assert 0.9 * measured["size"] < sum(measured["peaks"]) < measured["size"] + ROOM
    # Split evenly; every rank holds all the scales.
    for held in measured["held"]:
        assert held == pytest.approx(measured["packed"] / 2, rel=0.05)
    assert len(set(measured["scales"])) == 1
