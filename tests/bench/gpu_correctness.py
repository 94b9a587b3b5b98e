"""Values and every gradient of all ops beside the reference in float64, at sizes that models have: one JSON line.

Shapes are drawn at random, in the hundreds and thousands, from `--seed`. In 16 bits an error may be 1.5 times that of
the reference computed in the same dtype, in float32 1e-5; padding, and what four bits stand for, must be the same bit
for bit. It ends with exit code 1 where one is not: `make bench-gpu` then measures nothing.
"""

from __future__ import annotations

import random
import sys
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from typing import Any

import torch
from _gpu_line import Benchmark, Check, case_of, errors
from _gpu_timing import DEVICE
from torch import Tensor

import shardtune_kernels
from shardtune_kernels import FourBitWeight, LoraWeights, reference
from shardtune_kernels.biased_attention import attention_dropout_mask
from shardtune_kernels.dropout import dropout_mask

HALVES = (torch.float16, torch.bfloat16)
Shapes = Mapping[str, tuple[int, ...]]


class Sizes(random.Random):
    """Random sizes; a small run has the same, divided."""

    def __init__(self, seed: int, divisor: int) -> None:
        super().__init__(seed)
        self._divisor = divisor

    def of(self, least: int, most: int) -> int:
        return self.randint(max(1, least // self._divisor), max(2, most // self._divisor))


def drawn(shapes: Shapes) -> Callable[[], dict[str, Tensor | None]]:
    """Normal numbers; weights [n, k], `weight` or names that end in w, a or b, so that products keep their size."""

    def one(name: str, shape: tuple[int, ...]) -> Tensor:
        weight = len(shape) == 2 and (name[-1] in "wab" or name == "weight")
        return torch.randn(shape).double() / (shape[-1] ** 0.5 if weight else 1.0)

    return lambda: {name: one(name, shape) for name, shape in shapes.items()}


def lora_shapes(name: str, n: int, k: int, rank: int) -> dict[str, tuple[int, ...]]:
    return {f"{name}_w": (n, k), f"{name}_a": (rank, k), f"{name}_b": (n, rank)}


def layer(given: Mapping[str, Any], name: str) -> LoraWeights:
    return LoraWeights(given[f"{name}_w"], None, given[f"{name}_a"], given[f"{name}_b"], 0.5)


def lora(sizes: Sizes, trained: bool, rate: float) -> Iterator[Check]:
    """One layer, three on the same input, and a gated feed-forward layer."""
    m, d, f, rank = sizes.of(300, 2000), sizes.of(300, 1500), sizes.of(500, 3000), sizes.choice([8, 16, 64])
    seeds = [sizes.randrange(1 << 31) for _ in range(3)]
    masks = [dropout_mask(seed, rate, (m, d), DEVICE) if rate else None for seed in seeds]
    qkv = {"x": (m, d)}
    for name, n in zip("qkv", (d, sizes.of(100, 500), sizes.of(100, 500)), strict=True):
        qkv |= lora_shapes(name, n, d, rank)
    said = f"rows {m}, d {d}, f {f}, rank {rank}, dropout {rate}, weights trained {trained}"

    def plain(x: Tensor, name: str, mask: Tensor | None, given: Mapping[str, Any]) -> Tensor:
        return reference.lora_linear(x, layer(given, name), mask, rate)

    yield Check(
        f"lora_linear, {said}", lambda **g: shardtune_kernels.lora_linear(g["x"], layer(g, "q"), rate, seeds[0]),
        lambda **g: plain(g["x"], "q", masks[0], g), drawn({n: s for n, s in qkv.items() if n[0] in "xq"}),
        trained={"q_w": trained},
    )  # fmt: skip
    yield Check(
        f"lora_qkv, {said}",
        lambda **g: shardtune_kernels.lora_qkv(g["x"], [layer(g, name) for name in "qkv"], rate, seeds),
        lambda **g: tuple(plain(g["x"], name, mask, g) for name, mask in zip("qkv", masks, strict=True)), drawn(qkv),
        trained={f"{name}_w": trained for name in "qkv"},
    )  # fmt: skip
    mlp = {"x": (m, d), **lora_shapes("gate", f, d, rank), **lora_shapes("up", f, d, rank)}
    mlp |= lora_shapes("down", d, f, rank)
    names = ("gate", "up", "down")
    last = dropout_mask(seeds[2], rate, (m, f), DEVICE) if rate else None
    for activation in ("silu", "gelu_tanh"):
        yield Check(
            f"lora_gated_mlp, {activation}, {said}",
            lambda activation=activation, **g: shardtune_kernels.lora_gated_mlp(
                g["x"], *(layer(g, name) for name in names), activation, rate, seeds if rate else None
            ),
            lambda activation=activation, **g: reference.lora_gated_mlp(
                g["x"], *(layer(g, name) for name in names), activation, (masks[0], masks[1], last), rate
            ),
            drawn(mlp), trained={f"{name}_w": trained for name in names},
        )  # fmt: skip


def four_bit(sizes: Sizes) -> Iterator[Check]:
    """Products of few rows and many with weights in four bits, whose values must be those of the reference."""
    for rows in (1, sizes.of(16, 100), sizes.of(300, 2000)):
        n, k = sizes.of(300, 3000), 64 * sizes.of(8, 40)
        for dtype in HALVES:
            packed = torch.randint(256, (n * k // 2,), dtype=torch.uint8, device=DEVICE)
            codes = torch.randint(256, (n * k // 64,), dtype=torch.uint8, device=DEVICE)
            outer = (torch.rand(-(-len(codes) // 256), device=DEVICE) + 0.1) / k**0.5
            weight = FourBitWeight(packed, codes, (n, k), dtype, "nf4", 64, outer, outer.mean())
            if not torch.equal(shardtune_kernels.nf4_dequantize(weight), reference.dequantized(weight)):
                raise SystemExit(f"gpu_correctness: nf4_dequantize is wrong for {(n, k)} in {dtype}")
            yield Check(
                f"four_bit_linear, {rows} rows, {(n, k)}", lambda x, w=weight: shardtune_kernels.four_bit_linear(x, w),
                lambda x, w=weight: reference.lora_linear(x, LoraWeights(w, None)), drawn({"x": (rows, k)}),
                only=[dtype],
            )  # fmt: skip


def loss(sizes: Sizes) -> Iterator[Check]:
    rows, width, classes = sizes.of(500, 1500), sizes.of(300, 1000), sizes.of(5000, 40_000)
    targets = torch.randint(classes, (rows,))
    targets[:: sizes.choice([2, 5])] = -100
    for options in ({}, {"soft_cap": 20.0, "label_smoothing": 0.1, "scale": 0.5}):
        yield Check(
            f"linear_cross_entropy, {(rows, width, classes)}, {options}",
            partial(shardtune_kernels.linear_cross_entropy, **options),
            partial(reference.linear_cross_entropy, **options),
            lambda: {**drawn({"hidden": (rows, width), "weight": (classes, width)})(), "targets": targets},
        )  # fmt: skip


def pointwise(sizes: Sizes) -> Iterator[Check]:
    """Norms of rows that are held whole, and of those that are not; rotary positions; activations."""
    for width in (sizes.of(1000, 8000), sizes.of(17_000, 20_000)):
        rows = sizes.of(200, 600)
        norm = {"x": (rows, width), "weight": (width,)}
        for kind, more in (("llama", {}), ("t5", {"residual": (rows, width)}), ("gemma", {})):
            yield Check(
                f"rms_norm, {kind}, {(rows, width)}", partial(shardtune_kernels.rms_norm, eps=1e-6, kind=kind),
                partial(reference.rms_norm, eps=1e-6, kind=kind), drawn({**norm, **more}),
            )  # fmt: skip
        yield Check(
            f"layer_norm, {(rows, width)}", partial(shardtune_kernels.layer_norm, eps=1e-5),
            partial(reference.layer_norm, eps=1e-5), drawn({**norm, "bias": (width,), "residual": (rows, width)}),
        )  # fmt: skip
    b, s, d = sizes.of(2, 4), sizes.of(200, 900), sizes.choice([64, 128])
    tables = {"cos": (1, s, d), "sin": (1, s, d)}
    yield Check(
        f"rope, {(b, s, d)}", shardtune_kernels.rope, reference.rope,
        drawn({"q": (b, 8, s, d), "k": (b, 2, s, d), **tables}), trained=dict.fromkeys(tables, False),
    )  # fmt: skip
    shape = sizes.of(300, 900), sizes.of(1000, 9000)
    for activation in ("silu", "gelu_tanh", "gelu"):
        yield Check(
            f"gated_activation, {activation}, {shape}",
            partial(shardtune_kernels.gated_activation, activation=activation),
            partial(reference.gated_activation, activation=activation), drawn({"gate": shape, "up": shape}),
        )  # fmt: skip


def attention(sizes: Sizes) -> Iterator[Check]:
    """Encoder, decoder and documents in one row, with and without dropout."""
    b, h, d = 2, sizes.of(2, 4), 64
    for kind in ("encoder", "decoder", "documents"):
        s = t = sizes.of(400, 1200)
        rows = 1 if kind == "documents" else b
        options: dict[str, Any] = {"bidirectional": kind != "decoder", "causal": kind == "decoder"}
        if kind == "documents":
            options["offsets"] = (torch.tensor([0, s // 3, s // 2, s], device=DEVICE),) * 2
        for rate in (0.0, 0.1):
            seed = sizes.randrange(1 << 31)
            kept = {"kept": attention_dropout_mask(seed, rate, rows, h, s, t, DEVICE), "rate": rate} if rate else {}
            draw = drawn(dict.fromkeys(("q", "k", "v"), (rows, h, s, d)) | {"table": (32, h)})
            yield Check(
                f"biased_attention, {kind}, {(rows, h, s, d)}, dropout {rate}",
                lambda rate=rate, seed=seed, options=options, **g: shardtune_kernels.biased_attention(
                    **g, dropout=rate, seed=seed, scale=d**-0.5, **options
                ),
                partial(reference.biased_attention, scale=d**-0.5, **kept, **options), draw,
            )  # fmt: skip


def padding(sizes: Sizes) -> bool:
    """Whether rows laid out on the device are those of the reference, and come back."""
    lengths = [sizes.of(1, 2000) for _ in range(64)]
    offsets = torch.tensor([0, *lengths], device=DEVICE).cumsum(0).int()
    tokens = torch.randint(50_000, (sum(lengths),), dtype=torch.int32, device=DEVICE)
    same = []
    for left in (False, True):
        ours, truth = (
            of.pad(tokens, offsets, max(lengths), fill=3, left=left) for of in (shardtune_kernels, reference)
        )
        same += list(map(torch.equal, ours, truth))
        rows = ours[0].unsqueeze(-1)
        same.append(torch.equal(shardtune_kernels.unpad(rows, offsets, sum(lengths), left)[:, 0].int(), tokens))
    ours, truth = shardtune_kernels.pack(tokens, offsets), reference.pack(tokens, offsets)
    return all([*same, *map(torch.equal, ours, truth)])


def main() -> None:
    bench = Benchmark(None, __doc__, rounds=1)
    sizes = Sizes(20, 30 if bench.small else 1)
    cases = []
    for name, checks in {
        "lora": lambda: [*lora(sizes, False, 0.0), *lora(sizes, False, 0.1), *lora(sizes, True, 0.0)],
        "four_bit": lambda: four_bit(sizes), "cross_entropy": lambda: loss(sizes),
        "pointwise": lambda: pointwise(sizes), "attention": lambda: attention(sizes),
    }.items():  # fmt: skip
        found = errors(checks(), draws=3 if name == "cross_entropy" else 1)
        bench.collect(found)
        cases.append(case_of({"ours": None}, {}, what=name, errors=found))
        print(f"gpu_correctness: {name}: {found}", file=sys.stderr)
    bench.collect({"int32": {"largest_error": 0.0, "ok": padding(sizes)}})
    bench.report(cases)


if __name__ == "__main__":
    main()
