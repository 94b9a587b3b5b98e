"""What is taken away of a run does not depend on how it was stored, and ends where the run's own answers end."""

from __future__ import annotations

import json
import random
from pathlib import Path

import bitsandbytes
import bitsandbytes.functional as bnb
import pytest
import torch
from bitsandbytes.autograd._functions import MatMul8bitFp
from safetensors.torch import load_file
from torch import nn
from transformers import AutoTokenizer

from chats import TEMPLATES, make_tokenizer
from shardtune.cli import main
from shardtune.model.quantized import Linear8bit
from skeletons import MODELS
from tiny import ARCHITECTURES, TASKS, rows, tiny_config

SEED = random.SystemRandom().randrange(2**31)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_int8_weights_are_those_that_bitsandbytes_computes_with(dtype: torch.dtype) -> None:
    torch.manual_seed(SEED)
    ins, outs = 4 * random.Random(SEED).randint(1, 40), random.Random(SEED + 1).randint(1, 60)
    stored, scales, _ = bnb.int8_vectorwise_quant(torch.randn(outs, ins).half())
    layer = Linear8bit(nn.Linear(ins, outs, bias=False, device="meta"), dtype, "layer")
    layer.weight = nn.Parameter(stored.view(torch.uint8).view(-1).view(dtype).view(-1, 1), requires_grad=False)
    layer._buffers["absmax"] = scales.float()
    state = bitsandbytes.MatmulLtState()
    state.CB, state.SCB, state.has_fp16_weights, state.is_training = stored, scales.float(), False, True
    theirs = MatMul8bitFp.apply(torch.eye(ins, dtype=dtype), stored, None, None, state)
    assert isinstance(theirs, torch.Tensor)
    assert torch.equal(layer.dequantize(), theirs.T), f"seed {SEED}"


@pytest.fixture(scope="module")
def run(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The folder of a run of bfloat16 adapters on conversations."""
    folder = tmp_path_factory.mktemp("away")
    make_tokenizer(TEMPLATES["qwen"]).save_pretrained(folder / "tokenizer")
    with (folder / "chats.jsonl").open("w") as file:
        for row in rows(30, seed=1):
            turns = [{"role": "user", "content": row["text"]}, {"role": "assistant", "content": row["summary"]}]
            file.write(json.dumps({"messages": turns}) + "\n")
    config = tiny_config(
        folder / "config", "llama", runs=str(folder / "runs"), data={"train": str(folder / "chats.jsonl")},
        model__tokenizer=str(folder / "tokenizer"), tuning={"method": "lora", "dtype": "bfloat16"},
        task={"kind": "causal", "messages": "messages", "max_source_tokens": 96}, duration__steps=3,
    )  # fmt: skip
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("SHARDTUNE_CACHE", str(folder / "cache"))
        assert main(["train", "--config", str(config), "--ranks", "1"]) == 0
    return folder / "runs" / "tiny"


def test_an_adapter_is_float32_whatever_it_was_trained_in(run: Path) -> None:
    dtypes = {tensor.dtype for tensor in load_file(run / "final" / "adapter_model.safetensors").values()}
    assert dtypes == {torch.float32}


def test_a_merged_model_stops_at_the_turns_end(run: Path, tmp_path: Path) -> None:
    assert main(["export", "--run", str(run), "--out", str(tmp_path / "merged"), "--merge"]) == 0
    ends = json.loads((tmp_path / "merged" / "generation_config.json").read_text())["eos_token_id"]
    end = AutoTokenizer.from_pretrained(tmp_path / "merged").convert_tokens_to_ids("<|im_end|>")
    assert end in (ends if isinstance(ends, list) else [ends])


def test_a_merged_classifier_is_judged_as_the_adapter_is(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """With a head of several layers, as this model has."""
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    monkeypatch.setitem(ARCHITECTURES, "roberta", MODELS["roberta"])
    config = tiny_config(
        tmp_path, "roberta", tuning={"method": "vera", "rank": 4}, task=TASKS["classification"], duration__steps=2
    )
    assert main(["train", "--config", str(config), "--ranks", "1"]) == 0, capsys.readouterr().err
    run, out = tmp_path / "runs" / "tiny", tmp_path / "merged"
    assert main(["export", "--run", str(run), "--out", str(out), "--merge"]) == 0, capsys.readouterr().err
    shown = []
    for checkpoint in (run / "final", out):
        capsys.readouterr()
        given = ["--config", str(config), "--split", "validation", "--checkpoint", str(checkpoint)]
        assert main(["evaluate", *given]) == 0, capsys.readouterr().err
        shown.append(capsys.readouterr().out)
    assert shown[0] == shown[1]
