"""What training lines say of how well the devices are used."""

from __future__ import annotations

import time
from typing import Any

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.utils.flop_counter import FlopCounterMode

import tiny
from shardtune import rank_figures as rank_figures_module
from shardtune.devices import peak_flops
from shardtune.energy import EnergyMeter
from shardtune.flops import work_of
from shardtune.loop import StepReport
from shardtune.model.quantized import QuantizedLinear
from shardtune.progress import Progress
from shardtune.rank_figures import RankFigures
from shardtune.reporting import Reporter
from shardtune.state import TrainingState
from shardtune.world import World

LENGTH, EXAMPLES = 24, 3
WIDER: dict[str, dict[str, Any]] = {
    "t5": {"d_model": 64, "d_kv": 24, "d_ff": 160, "tie_word_embeddings": True},
    "bart": {"d_model": 64, "encoder_ffn_dim": 160, "decoder_ffn_dim": 160, "decoder_layers": 3},
    "llama": {"hidden_size": 64, "intermediate_size": 160, "num_hidden_layers": 3, "head_dim": 20},
    "gpt2": {"n_embd": 64, "n_layer": 3},
}


def make(name: str) -> nn.Module:
    settings = {**tiny.ARCHITECTURES[name], **WIDER[name], "attn_implementation": "eager"}
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    kind = transformers.AutoModelForSeq2SeqLM if config.is_encoder_decoder else transformers.AutoModelForCausalLM
    return kind.from_config(config)


def measured(model: nn.Module) -> int:
    """What torch counts, forward and backward, where sources and targets are as long."""
    model.train()
    ids = torch.randint(3, 400, (EXAMPLES, LENGTH))
    with FlopCounterMode(display=False) as counter:
        model(input_ids=ids, labels=ids).loss.backward()
    return counter.get_total_flops()


def told(model: nn.Module) -> float:
    work = work_of(model)
    tokens = EXAMPLES * LENGTH
    return work.flops(tokens if work.encoder is None else 2 * tokens, tokens, EXAMPLES)


@pytest.mark.parametrize("name", sorted(WIDER))
def test_the_work_is_what_torch_counts(name: str) -> None:
    model = make(name)
    assert told(model) == pytest.approx(measured(model), rel=0.02)


@pytest.mark.parametrize(("name", "targets"), [("t5", ["q", "v"]), ("llama", ["q_proj", "down_proj"])])
def test_frozen_weights_need_no_gradient_of_their_own(name: str, targets: list[str]) -> None:
    whole = told(make(name))
    model = get_peft_model(make(name), LoraConfig(r=4, target_modules=targets))  # pyright: ignore
    # Torch leaves out the gradients of what comes before the first adapter, which is little.
    assert told(model) == pytest.approx(measured(model), rel=0.08)
    assert told(model) < 0.85 * whole


def test_a_quantized_layer_takes_what_it_would_otherwise() -> None:
    model: Any = make("llama")
    for parameter in model.parameters():
        parameter.requires_grad_(False)
    plain = work_of(model)
    layer = model.model.layers[0].mlp
    layer.up_proj = QuantizedLinear(layer.up_proj, 4, torch.float32, "up_proj")
    assert layer.up_proj.weight.numel() < 160 * 64
    assert work_of(model) == plain


def test_peaks_of_devices() -> None:
    for name, dtype, peak in (
        ("NVIDIA H100 80GB HBM3", "bfloat16", 989.4e12),
        ("NVIDIA H100 PCIe", "bfloat16", 756e12),
        ("NVIDIA A100-SXM4-80GB", "float32", 19.5e12),
        ("NVIDIA GH200 480GB", "bfloat16", 989.4e12),
        ("NVIDIA L4", "bfloat16", 121e12),
        ("NVIDIA L40S", "bfloat16", 362e12),
        ("NVIDIA A10G", "bfloat16", 70e12),
        ("NVIDIA A1000 Laptop GPU", "bfloat16", None),
        ("NVIDIA GeForce RTX 4090 Laptop GPU", "bfloat16", None),
        ("CPU", "float32", None),
        ("", "float32", None),
    ):
        assert peak_flops(name, dtype) == peak, name


class Gathering(World):
    """One of three ranks of which the others are told what they say."""

    def __init__(self, rank: int) -> None:
        super().__init__(rank, 3, rank, torch.device("cpu"))


def test_the_slowest_rank_is_found(monkeypatch: pytest.MonkeyPatch) -> None:
    clock = [100.0]
    monkeypatch.setattr(rank_figures_module.time, "perf_counter", lambda: clock[0])
    ranks = [RankFigures(Gathering(rank), in_step=False) for rank in range(3)]

    def step(waits: list[float], forward: list[float]) -> None:
        sums = [sum(column) for column in zip(*(r.own(w) for r, w in zip(ranks, waits, strict=True)), strict=True)]
        for one in ranks:
            one.told(sums)
        for one, seconds in zip(ranks, forward, strict=True):
            for _ in range(2):
                with one.forward():
                    clock[0] += seconds / 2

    step([5.0, 0.0, 0.0], [1.0, 1.0, 4.0])  # what is read before the first step counts for nothing
    assert [one.since() for one in ranks] == [{}] * 3
    step([0.5, 0.0, 0.0], [2.0, 2.0, 1.0])
    step([0.0, 1.0, 0.0], [9.0, 0.0, 0.0])
    found = {"slowest_rank": 2, "slowest_rank_share": pytest.approx(5.0 / (12.5 / 3) - 1)}
    assert [one.since() for one in ranks] == [found] * 3
    step([0.0, 0.0, 0.0], [0.0, 0.0, 0.0])
    assert ranks[0].since()["slowest_rank"] == 0


def test_where_ranks_meet_in_the_forward_pass_only_waiting_counts() -> None:
    ranks = RankFigures(Gathering(1), in_step=True)
    for _ in range(2):
        with ranks.forward():
            time.sleep(0.01)
        own = ranks.own(0.25)
        assert own == [0.0, 0.25, 0.0, 0.0, 0.0]
        ranks.told(own)
    assert ranks.since() == {"slowest_rank": 1, "slowest_rank_share": pytest.approx(2.0)}


def test_energy_goes_on_where_all_devices_tell(monkeypatch: pytest.MonkeyPatch) -> None:
    assert EnergyMeter(torch.device("cpu")).joules() is None
    ranks = RankFigures(Gathering(0), in_step=True, joules=1000.0)
    monkeypatch.setattr(ranks._meter, "joules", lambda: 20.0)
    assert ranks.own(0.0)[3:] == [1.0, 20.0]
    ranks.told([0.0, 0.0, 0.0, 3.0, 70.0])
    assert ranks.since() == {"energy_joules": 1070.0}
    ranks.told([0.0, 0.0, 0.0, 2.0, 50.0])  # one of them did not
    assert ranks.since() == {}


def test_the_counter_of_a_device_is_read_now_and_then(monkeypatch: pytest.MonkeyPatch) -> None:
    now, counter, reads = [0.0], [5_000_000], []
    monkeypatch.setattr("shardtune.energy.time.monotonic", lambda: now[0])
    monkeypatch.setattr(EnergyMeter, "_open", lambda self, device: True)
    monkeypatch.setattr(EnergyMeter, "_counter", lambda self: reads.append(1) or counter[0])
    meter = EnergyMeter(torch.device("cuda"))
    assert meter.joules() == 0.0
    for _ in range(40):
        now[0] += 0.1001
        counter[0] += 30_000
    assert meter.joules() == pytest.approx(1200.0)
    assert meter.joules() == pytest.approx(1200.0)
    assert len(reads) == 2


class Kept:
    """What a reporter writes."""

    def __init__(self) -> None:
        self.lines: list[dict[str, float]] = []

    def training(self, step: int, figures: dict[str, float]) -> None:
        self.lines.append({"step": step, **figures})


def test_utilization_of_known_devices() -> None:
    device, work = torch.device("cpu"), work_of(make("llama"))
    for peaks in ([1e9, 3e9], [1e9, None]):
        state, kept = TrainingState(step=1, tokens=50, target_tokens=20, examples=2), Kept()
        records: Any = kept
        progress = Progress(9, 0, enabled=False, every=2)
        reporter = Reporter(records, progress, device, state, 9, lambda epoch: 100, 2, None, work, peaks)
        for step in (2, 3, 4):
            state.step, state.tokens, state.target_tokens, state.examples = step, 50 * step, 20 * step, 2 * step
            reporter.after_step(StepReport(1.0, 1.0, 1.0, 50, 0.0, 0.5, 0.0))
        assert [line["tokens_per_second_per_device"] for line in kept.lines] == [50.0, 50.0]
        assert all("memory_allocated_bytes" not in line for line in kept.lines)
        if None in peaks:
            assert all("mfu" not in line for line in kept.lines)
        else:
            taken = [work.flops(50, 20, 2) / 0.5 / 4e9, work.flops(100, 40, 4) / 1.0 / 4e9]
            assert [line["mfu"] for line in kept.lines] == pytest.approx(taken)
