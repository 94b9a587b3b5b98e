from __future__ import annotations

import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import DEVICE, DTYPES, agree, seed_everything
from compiling import same_when_compiled
from mutants import Mutant, is_noticed
from torch import Tensor

import shardtune_kernels
from shardtune_kernels import reference
from shardtune_kernels.dropout import dropout_mask
from shardtune_kernels.weights import FourBitWeight, LoraWeights

NAMES = ("gate", "up", "down")
SEEDS = (11, 12, 13)


def drawn(rng: random.Random, adapters: tuple[bool, ...], biases: bool) -> dict[str, Tensor]:
    """x [., ., d] and each layer's tensors, by name; ranks differ."""
    d, f = rng.randint(24, 48), rng.randint(40, 80)
    tensors = {"x": torch.randn(2, rng.randint(12, 20), d, dtype=torch.float64)}
    for name, (n, k), adapted in zip(NAMES, ((f, d), (f, d), (d, f)), adapters, strict=True):
        tensors[f"{name}_weight"] = torch.randn(n, k, dtype=torch.float64) / k**0.5
        if biases:
            tensors[f"{name}_bias"] = torch.randn(n, dtype=torch.float64)
        if adapted:
            r = rng.randint(4, 9)
            tensors[f"{name}_a"] = torch.randn(r, k, dtype=torch.float64) / k**0.5
            tensors[f"{name}_b"] = torch.randn(n, r, dtype=torch.float64)
    return tensors


def layers(given: dict[str, Any], made: Callable[..., Any] = LoraWeights) -> list[Any]:
    return [
        made(*(given.get(f"{name}_{part}") for part in ("weight", "bias", "a", "b")), 0.5 + 0.25 * index)
        for index, name in enumerate(NAMES)
    ]


def op_and_truth(kernels: Any, activation: str, rate: float) -> tuple[Callable[..., Tensor], Callable[..., Tensor]]:
    """Of the same dropout."""
    made = kernels.LoraWeights

    def op(**given: Any) -> Tensor:
        return kernels.lora_gated_mlp(given["x"], *layers(given, made), activation, rate, SEEDS if rate else None)

    def truth(**given: Any) -> Tensor:
        x, weights = given["x"], layers(given)
        shapes = [(x.numel() // x.shape[-1], w.weight.shape[1]) for w in weights]
        masks = [
            dropout_mask(seed, rate, shape, x.device).view(*x.shape[:-1], shape[1]) if rate else None
            for seed, shape in zip(SEEDS, shapes, strict=True)
        ]
        return reference.lora_gated_mlp(x, *weights, activation, masks, rate)

    return op, truth


def check(kernels: Any, seed: int, dtypes: list[torch.dtype] = DTYPES, rates: tuple[float, ...] = (0.0, 0.25)) -> None:
    """Every activation, with adapters on some layers or all, dropout or none, weights trained or frozen."""
    rng = seed_everything(seed)
    for dtype in dtypes:
        for activation in reference.ACTIVATIONS:
            if activation == "relu" and dtype.itemsize < 4:
                continue  # a gate that is rounded over 0, here or in the reference, turns a whole gradient
            rate = rng.choice(rates)
            adapters = rng.choice([(True, True, True), (True, False, True), (False, True, False), (False,) * 3])
            if len(dtypes) == 1:
                adapters = (True, True, True)
            tensors = drawn(rng, adapters, rng.random() < 0.5)
            trained = {name: rng.random() < 0.5 for name in tensors if name.endswith("weight")}
            table = {n: torch.float32 for n in tensors if n[-2:] in ("_a", "_b")} if rng.random() < 0.3 else {}
            said = seed, activation, rate, adapters, {name: tuple(tensor.shape) for name, tensor in tensors.items()}
            agree(*op_and_truth(kernels, activation, rate), tensors, dtype, said, table, trained)


@pytest.mark.parametrize("seed", range(4))
def test_values_and_gradients(seed: int) -> None:
    check(shardtune_kernels, seed)


@pytest.mark.parametrize("rate", [0.0, 0.25])
@pytest.mark.parametrize("needed", ["x", "gate_a", "up_b", "down_a", "down_b", "down_weight", "up_weight", "gate_bias"])
def test_only_what_is_needed_gets_a_gradient(needed: str, rate: float) -> None:
    torch.manual_seed(0)
    tensors = drawn(random.Random(0), (True, True, True), True)
    trained = {name: name == needed for name in tensors}
    agree(*op_and_truth(shardtune_kernels, "silu", rate), tensors, torch.float32, needed, trained=trained)


@pytest.mark.parametrize("rate", [0.0, 0.25])
def test_weights_in_four_bits(rate: float) -> None:
    torch.manual_seed(0)
    tensors = drawn(random.Random(1), (True, True, True), False)
    given = {name: tensor.float().to(DEVICE) for name, tensor in tensors.items()}
    dense, packed = dict(given), dict(given)
    for name in NAMES:
        n, k = given[f"{name}_weight"].shape
        weight = FourBitWeight(
            torch.randint(256, (-(-n * k // 2),), dtype=torch.uint8, device=DEVICE),
            torch.rand(-(-n * k // 64), device=DEVICE), (n, k), torch.float32,
        )  # fmt: skip
        dense[f"{name}_weight"], packed[f"{name}_weight"] = reference.dequantized(weight), weight
    results = []
    for own in (dense, packed):
        leaves = {n: t.clone().requires_grad_() for n, t in own.items() if not n.endswith("weight")}
        op, _ = op_and_truth(shardtune_kernels, "silu", rate)
        y = op(**{**own, **leaves})
        y.sum().backward()
        results.append([y.detach(), *(leaf.grad for leaf in leaves.values())])
    for got, wanted in zip(*reversed(results), strict=True):
        torch.testing.assert_close(got, wanted)


@pytest.mark.parametrize("lead", [(0,), (2, 0), (1,), ()])
def test_edges(lead: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    tensors = drawn(random.Random(2), (True, True, True), True)
    tensors["x"] = torch.randn(*lead, tensors["x"].shape[-1], dtype=torch.float64)
    for rate in (0.0, 0.25) if lead else (0.0,):
        agree(*op_and_truth(shardtune_kernels, "silu", rate), tensors, torch.float32, lead)


def test_an_input_that_is_not_contiguous() -> None:
    torch.manual_seed(0)
    tensors = drawn(random.Random(3), (True, True, True), False)
    tensors["x"] = torch.randn(tensors["x"].shape[-1], 3, 4, dtype=torch.float64).permute(1, 2, 0)
    for rate in (0.0, 0.25):
        agree(*op_and_truth(shardtune_kernels, "silu", rate), tensors, torch.float32)


def test_what_is_saved() -> None:
    """x, the outputs of gate and up, and columns of the rank: nothing else that grows with the rows."""
    m, d, f, r = 50, 32, 48, 4
    x = torch.randn(m, d, device=DEVICE, requires_grad=True)

    def layer(n: int, k: int) -> LoraWeights:
        return LoraWeights(
            torch.randn(n, k, device=DEVICE), None, torch.randn(r, k, device=DEVICE, requires_grad=True),
            torch.randn(n, r, device=DEVICE, requires_grad=True),
        )  # fmt: skip

    weights = layer(f, d), layer(f, d), layer(d, f)
    own = {t.data_ptr() for w in weights for t in w[:4] if t is not None}
    saved: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        if tensor.data_ptr() not in own:
            saved[tensor.data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        shardtune_kernels.lora_gated_mlp(x, *weights, dropout=0.1)
    assert sum(saved.values()) <= 4 * m * (d + 2 * f + 3 * r) + 8 * 3


def test_weights_may_be_gathered_anew_between_forward_and_backward() -> None:
    torch.manual_seed(0)
    tensors = {n: t.float().to(DEVICE) for n, t in drawn(random.Random(4), (True, True, True), False).items()}
    weights = {n: torch.nn.Parameter(t, requires_grad=not n.endswith("weight")) for n, t in tensors.items()}
    results = []
    for moves in (False, True):
        y = shardtune_kernels.lora_gated_mlp(weights["x"], *layers(weights))
        if moves:
            for parameter in [own for name, own in weights.items() if name != "x"]:
                kept = parameter.detach().clone()
                parameter.data.zero_()  # what a sharded model frees, and gathers into other memory
                parameter.data = kept
        results.append(torch.autograd.grad(y.sum(), [p for p in weights.values() if p.requires_grad]))
    for first, second in zip(*results, strict=True):
        torch.testing.assert_close(first, second)


def test_under_autocast_it_is_computed_in_its_dtype() -> None:
    torch.manual_seed(0)
    tensors = {n: t.float().to(DEVICE) for n, t in drawn(random.Random(8), (True, True, True), False).items()}
    weights = layers(tensors)
    with torch.autocast(DEVICE.type, torch.bfloat16):
        got = shardtune_kernels.lora_gated_mlp(tensors["x"], *weights)
    wanted = shardtune_kernels.lora_gated_mlp(tensors["x"].bfloat16(), *weights)
    assert got.dtype == torch.bfloat16
    torch.testing.assert_close(got, wanted)


def test_a_second_backward_is_an_error() -> None:
    tensors = {n: t.float().to(DEVICE) for n, t in drawn(random.Random(5), (True, True, True), False).items()}
    y = shardtune_kernels.lora_gated_mlp(tensors.pop("x").requires_grad_(), *layers(tensors)).sum()
    y.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        y.backward()


def test_seeds_are_drawn_from_torchs_stream() -> None:
    tensors = {n: t.float().to(DEVICE) for n, t in drawn(random.Random(6), (True, True, True), False).items()}
    found = []
    for seed in (0, 0, 1):
        torch.manual_seed(seed)
        found.append(shardtune_kernels.lora_gated_mlp(tensors["x"], *layers(tensors), dropout=0.5))
    assert torch.equal(found[0], found[1])
    assert not torch.equal(found[0], found[2])


def test_what_does_not_fit_is_an_error() -> None:
    x, wide, narrow = torch.zeros(2, 4), LoraWeights(torch.zeros(6, 4)), LoraWeights(torch.zeros(4, 6))
    call = shardtune_kernels.lora_gated_mlp
    with pytest.raises(ValueError, match="activation must be one of"):
        call(x, wide, wide, narrow, "tanh")
    with pytest.raises(ValueError, match="does not fit"):
        call(x, narrow, wide, narrow)
    with pytest.raises(ValueError, match="gate has 6 outputs"):
        call(x, wide, wide, wide)
    with pytest.raises(ValueError, match="a seed for each"):
        call(x, wide, wide, narrow, dropout=0.5, seeds=[1])
    with pytest.raises(ValueError, match="below 1"):
        call(x, wide, wide, narrow, dropout=1.0)


def test_compiled() -> None:
    torch.manual_seed(0)
    tensors = {name: tensor.float() for name, tensor in drawn(random.Random(7), (True, True, True), False).items()}
    op, _ = op_and_truth(shardtune_kernels, "silu", 0.25)
    same_when_compiled(op, tensors, tuple(name for name in tensors if name.endswith("weight")))


OP, SHARED = "lora_gated_mlp", "_lora_layers"
OF_GATE, OF_DOWN = "shared.dropout_of(settings, seeds, first", "shared.dropout_of(ctx.settings, seeds, second"
MUTANTS = [
    Mutant("up's dropout for gate", OP, f"{OF_GATE})", f"{OF_GATE}, 1)"),
    Mutant("gate's mask for down", OP, f"{OF_DOWN}, 2)", f"{OF_DOWN}, 0)"),
    Mutant("b of the layer before", SHARED, "column += self._rank", "column += 0"),
    Mutant("a of the layer before", SHARED, "row += self._rank", "row += 0"),
    Mutant(
        "gradients of gate and up swapped",
        OP,
        "shared.Gradients(first, [gate, up]",
        "shared.Gradients(first, [up, gate]",
    ),
]


@pytest.mark.parametrize("mutant", MUTANTS, ids=lambda mutant: mutant.what)
def test_a_broken_op_is_noticed(mutant: Mutant, tmp_path: Path) -> None:
    assert is_noticed(mutant, lambda kernels: check(kernels, 0, [torch.float32], (0.25,)), tmp_path)
