"""Offload decides where tensors rest, not what is trained; and where it cannot be had, the config is refused.

All runs happen before the first test, in one process group of two ranks. SHARDTUNE_TEST_SEED repeats a failure.
"""

from __future__ import annotations

import ctypes.util
import json
import os
import random
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor, nn

import launching
import tiny
from launching import BIN
from layouts import Done, Run, launch
from shardtune.assemble.many import train_many
from shardtune.assemble.parts import check_device
from shardtune.config_file import load_config
from shardtune.errors import ConfigError
from shardtune.strategy import fsdp2
from shardtune.strategy.zero import Zero
from shardtune.world import World

STEPS = 5
LORA = {"tuning": {"method": "lora", "rank": 3, "alpha": 6}}
CASES = {
    "t5-full": ("t5", {"model__dtype": "float32"}),
    "t5-lora-rounded": ("t5", {"model__dtype": "bfloat16", **LORA}),
    "llama-full-rounded": ("llama", {"model__dtype": "bfloat16"}),
    "llama-lora": ("llama", {"model__dtype": "float32", **LORA}),
    "llama-qlora-rounded": ("llama", {"model__dtype": "bfloat16", "tuning": {**LORA["tuning"], "method": "qlora"}}),
}
ALL = bool(os.environ.get("SHARDTUNE_TEST_ALL"))
"""The suite runs a sample."""
ADALORA = {"method": "adalora", "rank": 2, "initial_rank": 4, "begin": 0.2, "end": 0.8, "interval": 1}
CASES["llama-adalora"] = ("llama", {"model__dtype": "float32", "tuning": ADALORA})  # reads gradients and sets weights
if ALL:
    CASES |= {
        "t5-full-rounded": ("t5", {"model__dtype": "bfloat16"}),
        "t5-lora": ("t5", {"model__dtype": "float32", **LORA}),
        "llama-full": ("llama", {"model__dtype": "float32"}),
        "llama-lora-rounded": ("llama", {"model__dtype": "bfloat16", **LORA}),
    }
CLIPPED = 0.05
"""Below the gradient's norm in some step, whatever the seed: few parameters have a small one."""
SHARED = {"duration__steps": STEPS, "optimizer__max_grad_norm": CLIPPED, "optimizer__lr": 1e-2, "optimizer__warmup": 0}
KINDS = ("fsdp2", "zero2", "zero3")


def a_run(case: str, kind: str, offload: str) -> Run:
    model, options = CASES[case]
    return Run(f"{case}-{offload}", model, kind, 2, 2, {**SHARED, **options, "strategy__offload": offload})


CHOSEN = [(case, kind) for case in CASES for kind in KINDS if ALL or kind != "zero2" or "full" in case or "ada" in case]
PAIRS = [(a_run(case, kind, "none"), a_run(case, kind, "cpu")) for case, kind in CHOSEN]
RUNS = [run for pair in PAIRS for run in pair]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Done:
    seed = int(os.environ.get("SHARDTUNE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    made = Done(tmp_path_factory.mktemp("offload"), seed, RUNS)
    launch(made, RUNS, 2)
    return made


def distance(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """The largest relative norm of a tensor's difference."""
    assert got.keys() == wanted.keys()
    return max(
        float((got[n].double() - wanted[n].double()).norm() / wanted[n].double().norm().clamp(min=1e-30))
        for n in wanted
    )


@pytest.mark.parametrize("pair", PAIRS, ids=lambda pair: pair[1].name)
def test_an_offloaded_run_is_the_same(done: Done, pair: tuple[Run, Run]) -> None:
    (wanted, judged), (got, got_judged) = (done.metrics(run) for run in pair)
    assert [step["step"] for step in got] == list(range(1, STEPS + 1))
    for key in ("loss", "grad_norm"):
        far = max(abs(a[key] / b[key] - 1) for a, b in zip(got, wanted, strict=True))
        assert far <= 1e-5, f"{key} differs by {far}; seed {done.seed}"
    # One is judged with parameters gathered layer by layer, the other with all of them gathered: in bfloat16, fused
    # operations round otherwise there.
    limit = 1e-3 if pair[0].options.get("model__dtype") == "bfloat16" else 1e-5
    assert got_judged["loss"] == pytest.approx(judged["loss"], rel=limit), f"seed {done.seed}"
    assert max(step["grad_norm"] for step in got) > CLIPPED, f"nothing was clipped; seed {done.seed}"
    far = distance(done.final(pair[1]), done.final(pair[0]))
    assert far <= 1e-5, f"weights differ by {far}; seed {done.seed}"


@pytest.mark.parametrize(
    ("stage", "offload", "optimizer", "parameters"),
    [(2, "none", None, None), (2, "cpu", "cpu", None), (3, "cpu", "cpu", "cpu"), (3, "nvme", "nvme", "cpu")],
)
def test_deepspeed_is_told_where_to_put_what(
    stage: int, offload: str, optimizer: str | None, parameters: str | None
) -> None:
    """On a CPU all memory is the host's, so runs cannot show where tensors rest."""
    for device in ("cpu", "cuda"):
        world = World(0, 1, 0, torch.device(device))
        settings = Zero(world, torch.float32, stage, [], offload, "disk" if offload == "nvme" else None)._settings()
        zero = settings["zero_optimization"]
        pinned = {"pin_memory": device == "cuda"}
        on_disk = {"nvme_path": "disk"} if offload == "nvme" else {}
        assert zero.get("offload_optimizer") == (optimizer and {"device": optimizer, **pinned, **on_disk})
        assert zero.get("offload_param") == (parameters and {"device": parameters, **pinned})


@pytest.mark.parametrize("offload", [False, True])
def test_fsdp_is_told_to_offload(offload: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    told = []

    def stop(module: nn.Module, **options: Any) -> None:
        told.append(options.get("offload_policy"))
        raise InterruptedError

    monkeypatch.setattr(fsdp2, "fully_shard", stop)
    monkeypatch.setattr(fsdp2, "init_device_mesh", lambda *_: None)
    for device in ("cpu", "cuda"):
        strategy = fsdp2.Fsdp2(World(0, 1, 0, torch.device(device)), torch.float32, [], offload)
        with pytest.raises(InterruptedError):
            strategy.prepare(nn.Linear(2, 2, device="meta"), SimpleNamespace(dtype=lambda name: torch.float32), None)  # type: ignore
    assert [policy and policy.pin_memory for policy in told] == ([False, True] if offload else [None, None])


@pytest.mark.parametrize("case", CASES)
def test_weights_move(done: Done, case: str) -> None:
    """Or an offload that trains nothing would agree with another."""
    steps, _ = done.metrics(a_run(case, "fsdp2", "cpu"))
    assert steps[4]["loss"] < steps[0]["loss"], f"it does not learn the same examples; seed {done.seed}"


@pytest.mark.parametrize("optimizer", ["adamw", "adafactor"])
def test_one_process_offloads_too_and_auto_knows_how(
    tmp_path: Path, optimizer: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    losses = []
    for offload in ("none", "cpu"):
        options = {"name": offload, "strategy__offload": offload, "optimizer": {"name": optimizer, "warmup": 0}}
        train_many([str(tiny.tiny_config(tmp_path, **options))])
        folder = tmp_path / "runs" / offload
        assert json.loads((folder / "environment.json").read_text())["strategy"] == (
            "fsdp2" if offload == "cpu" else "single"
        )
        lines = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()]
        losses.append([line["loss"] for line in lines if "grad_norm" in line])
    assert len(losses[0]) == 4
    assert losses[1] == pytest.approx(losses[0], rel=1e-5)


def problems(folder: Path, **options: object) -> str:
    with pytest.raises(ConfigError) as error:
        load_config(tiny.tiny_config(folder, **options), [])
    return str(error.value)


@pytest.mark.parametrize("kind", ["single", "ddp", "zero1"])
def test_strategies_that_do_not_offload_refuse(tmp_path: Path, kind: str) -> None:
    said = problems(tmp_path, strategy={"kind": kind, "offload": "cpu"})
    assert f"strategy.offload: cpu is not for strategy.kind: {kind}, only for fsdp2, zero2, zero3" in said


@pytest.mark.parametrize("kind", ["fsdp2", "zero2"])
def test_only_zero3_offloads_to_a_disk(tmp_path: Path, kind: str) -> None:
    said = problems(tmp_path, strategy={"kind": kind, "offload": "nvme", "nvme": str(tmp_path)})
    assert f"strategy.offload: nvme is not for strategy.kind: {kind}, only for zero3" in said


def test_a_disk_needs_a_folder_and_the_other_way_round(tmp_path: Path) -> None:
    assert "strategy.nvme: offload: nvme needs a folder" in problems(tmp_path, strategy={"offload": "nvme"})
    assert "strategy.nvme: only with strategy.offload: nvme" in problems(tmp_path, strategy={"nvme": "disk"})


def test_paged_optimizers_do_not_offload_twice(tmp_path: Path) -> None:
    said = problems(tmp_path, optimizer={"name": "paged_adamw_8bit"}, strategy={"offload": "cpu"})
    assert "optimizer.name: paged_adamw_8bit has pages in the host's memory by itself" in said
    assert "or use adamw_8bit" in said


@pytest.mark.skipif(ctypes.util.find_library("aio") is not None, reason="libaio is here")
def test_without_libaio_the_run_ends_at_once_and_says_what_to_install(tmp_path: Path) -> None:
    config = tiny.tiny_config(tmp_path, strategy={"offload": "nvme", "nvme": str(tmp_path / "disk")})
    ended = launching.run([str(BIN / "shardtune"), "train", "--config", str(config)], tmp_path / "cache")
    assert ended.code == 2, ended.said
    assert "strategy.offload: nvme reads and writes through libaio, which is not installed here" in ended.err
    assert "apt-get install libaio-dev" in ended.err
    assert not (tmp_path / "runs").exists()
    assert "Traceback" not in ended.err


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is here")
@pytest.mark.parametrize("name", ["paged_adamw", "paged_adamw_8bit"])
def test_paging_needs_a_gpu(tmp_path: Path, name: str) -> None:
    config = load_config(tiny.tiny_config(tmp_path, optimizer={"name": name}), [])
    with pytest.raises(ConfigError, match=rf"optimizer\.name: {name} moves pages .*; use {name[6:]}$"):
        check_device(config, World(0, 1, 0, torch.device("cpu")))
