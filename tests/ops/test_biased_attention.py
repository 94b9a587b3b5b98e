"""Attention with T5's relative positions, beside the reference, as plain torch and as kernels."""

from __future__ import annotations

import importlib
import math
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import DEVICE, DTYPES, agree, seed_everything
from compiling import same_when_compiled
from mutants import Mutant, is_noticed, only_interpreted
from torch import Tensor

import shardtune_kernels
from shardtune_kernels import reference
from shardtune_kernels._biased_attention_launch import members_of
from shardtune_kernels._launch import INTERPRETED

module = importlib.import_module("shardtune_kernels.biased_attention")

KINDS = ("encoder", "decoder", "cross", "documents")


def cut(choose: random.Random, length: int, pieces: int, least: int = 0) -> Tensor:
    """int32 [pieces + 1]: where documents begin and end, each of `least` at least, so that some may be empty."""
    inner = sorted(choose.randint(0, length - least * pieces) for _ in range(pieces - 1))
    edges = [edge + least * index for index, edge in enumerate([0, *inner], start=0)]
    return torch.tensor([*edges, length], dtype=torch.int32)


def check(
    kernels: Any, seed: int, kind: str, dtype: torch.dtype, dropout: float = 0.0, frozen: tuple[str, ...] = ()
) -> None:
    """One shape at random, values and gradients."""
    attention = kernels.biased_attention
    choose = seed_everything(seed)
    b, h, d = choose.randint(1, 2), choose.randint(1, 2), choose.choice([5, 16])
    s, t = choose.randint(18, 48), choose.randint(18, 48)
    options: dict[str, Any] = {
        "bidirectional": kind in ("encoder", "documents"), "causal": kind == "decoder",
        "max_distance": choose.choice([11, 20]), "scale": choose.choice([1.0, 0.3]),
    }  # fmt: skip
    longest = None
    if kind == "documents":
        b = 1
        options["causal"] = choose.random() < 0.5
        # Where all queries see one key, gradients of q and k are 0 in truth, and what rounding the output leaves in
        # ours.
        offsets = cut(choose, s, 3), cut(choose, t, 3, least=4 if dtype.itemsize == 2 else 0)
        options["offsets"] = tuple(o.to(DEVICE) for o in offsets)
        if choose.random() < 0.5:
            longest = tuple(int(o.diff().max()) for o in offsets)
    elif choose.random() < 0.7:
        shown = torch.rand(b, t) < 0.7
        shown[0, :3] = False
        options["shown"] = shown.to(DEVICE)
    buckets = choose.choice([8, 12])
    tensors: dict[str, Tensor | None] = {
        "q": torch.randn(b, s, h, d).double().transpose(1, 2) / math.sqrt(options["scale"] * d**0.5),
        "k": torch.randn(b, t, h, d).double().transpose(1, 2) / math.sqrt(options["scale"] * d**0.5),
        "v": torch.randn(b, h, t, d).double(),
        "table": None if kind == "cross" else torch.randn(buckets, h).double(),
    }
    number = choose.randint(0, 1 << 40)
    truth = dict(options)
    if dropout:
        mask = kernels.biased_attention.__globals__["attention_dropout_mask"]
        truth |= {"kept": mask(number, dropout, b, h, s, t, DEVICE), "rate": dropout}
    said = f"seed {seed}, {kind}, q {(b, h, s, d)}, t {t}, dropout {dropout}, {options}"
    agree(
        lambda q, k, v, table: attention(q, k, v, table, longest=longest, dropout=dropout, seed=number, **options),
        lambda q, k, v, table: reference.biased_attention(q, k, v, table, **truth),
        tensors, dtype, said, trained=dict.fromkeys(frozen, False),
    )  # fmt: skip


@pytest.mark.parametrize("dropout", [0.0, 0.2])
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("kind", KINDS)
def test_values_and_gradients(kind: str, dtype: torch.dtype, dropout: float) -> None:
    for seed in random.sample(range(10_000), 1 if INTERPRETED else 4):
        check(shardtune_kernels, seed, kind, dtype, dropout)


@pytest.mark.parametrize("frozen", [("q", "table"), ("k", "v"), ("q", "k", "table"), ("v",), ("q", "k", "v")], ids=str)
def test_gradients_that_nobody_needs(frozen: tuple[str, ...]) -> None:
    check(shardtune_kernels, random.randrange(10_000), "encoder", torch.float32, frozen=frozen)


@pytest.mark.parametrize("shape", [(1, 1, 1, 1, 1), (2, 1, 1, 9, 3), (1, 2, 9, 1, 70), (1, 2, 0, 4, 8), (2, 1, 4, 0, 8),
                                   (0, 2, 4, 4, 8), (1, 1, 40, 3, 200)], ids=str)  # fmt: skip
@pytest.mark.parametrize("causal", [False, True])
def test_shapes_at_the_edge(shape: tuple[int, ...], causal: bool) -> None:
    b, h, s, t, d = shape
    torch.manual_seed(0)
    tensors = {
        "q": torch.randn(b, h, s, d).double(), "k": torch.randn(b, h, t, d).double(),
        "v": torch.randn(b, h, t, d).double(), "table": torch.randn(32, h).double(),
    }  # fmt: skip
    options: dict[str, Any] = {"causal": causal, "scale": d**-0.5}
    agree(
        lambda q, k, v, table: module.biased_attention(q, k, v, table, **options),
        lambda q, k, v, table: reference.biased_attention(q, k, v, table, **options),
        tensors, torch.float32, f"{shape}, causal {causal}",
    )  # fmt: skip


def test_a_query_that_sees_nothing_gives_zero_and_so_do_its_gradients() -> None:
    q, k, v = (torch.randn(2, 1, n, 8, device=DEVICE, requires_grad=True) for n in (20, 17, 17))
    shown = torch.zeros(2, 17, dtype=torch.bool, device=DEVICE)
    shown[1] = True
    out = module.biased_attention(q, k, v, causal=True, shown=shown)
    out.sum().backward()
    assert not out[0].any()
    assert not out[1, :, :3].any()
    assert out[1, :, 3:].all()
    for x in (q, k, v):
        assert x.grad is not None
        assert not x.grad[0].any()
        assert x.grad.isfinite().all()


def test_rows_that_are_not_contiguous_and_the_result_in_memory() -> None:
    wide = torch.randn(2, 2, 12, 16, device=DEVICE)
    q = wide[..., ::2]
    out = module.biased_attention(q, q, q)
    torch.testing.assert_close(out, reference.biased_attention(q, q, q), rtol=1e-5, atol=1e-5)
    if INTERPRETED or DEVICE.type == "cuda":
        assert out.transpose(1, 2).is_contiguous()


def test_the_same_twice() -> None:
    q, k, v = (torch.randn(1, 2, 20, 8, device=DEVICE) for _ in range(3))
    table = torch.randn(32, 2, device=DEVICE)
    found = []
    for _ in range(2):
        leaves = [x.clone().requires_grad_() for x in (q, k, v, table)]
        out = module.biased_attention(*leaves, dropout=0.3, seed=5)
        found.append([out, *torch.autograd.grad(out.square().sum(), leaves)])
    assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))


def test_what_dropout_keeps() -> None:
    kept = module.attention_dropout_mask(1 << 40, 0.25, 2, 3, 61, 70, DEVICE)
    assert kept.shape == (2, 3, 61, 70)
    assert kept.dtype == torch.bool
    assert abs(float(kept.float().mean()) - 0.75) < 0.02
    planes = kept.float().flatten(0, 1)
    for dim in (1, 2):  # neither rows nor columns nor planes are alike
        assert (planes.mean(dim) - 0.75).abs().max() < 0.35
    assert planes.flatten(1).corrcoef().triu(1).abs().max() < 0.1
    shifted = torch.stack((kept[..., :-1].flatten(), kept[..., 1:].flatten())).float().corrcoef()[0, 1]
    assert abs(float(shifted)) < 0.05
    assert not torch.equal(kept, module.attention_dropout_mask((1 << 40) + 1, 0.25, 2, 3, 61, 70, DEVICE))
    assert not torch.equal(kept, module.attention_dropout_mask(0, 0.25, 2, 3, 61, 70, DEVICE))
    assert module.attention_dropout_mask(3, 0.0, 1, 1, 5, 5, DEVICE).all()


def test_a_seed_is_drawn_from_torchs_stream() -> None:
    q = torch.randn(1, 1, 9, 8, device=DEVICE)
    outs = []
    for _ in range(2):
        torch.manual_seed(3)
        outs += [module.biased_attention(q, q, q, dropout=0.5), module.biased_attention(q, q, q, dropout=0.5)]
    assert torch.equal(outs[0], outs[2])
    assert not torch.equal(outs[0], outs[1])


@pytest.mark.parametrize("bidirectional", [True, False])
def test_buckets_are_those_of_transformers(bidirectional: bool) -> None:
    t5 = pytest.importorskip("transformers.models.t5.modeling_t5")
    distances = torch.arange(-300, 301)
    for buckets, most in ((32, 128), (8, 20), (12, 40)):
        wanted = t5.T5Attention._relative_position_bucket(distances, bidirectional, buckets, most)
        assert torch.equal(reference.buckets_of(distances, buckets, most, bidirectional), wanted)
        of, left, right = members_of(buckets, most, bidirectional, torch.device("cpu"))
        assert len(of) == left + right + 1
        assert torch.equal(of[distances.clamp(-left, right) + left], wanted)
        assert of[0] != of[1]
        assert right == 0 or of[-1] != of[-2]


def test_what_does_not_fit_is_said() -> None:
    q = torch.randn(1, 2, 4, 8)
    table = torch.randn(32, 2)
    offsets = torch.tensor([0, 4])
    wrong: list[tuple[str, tuple[Any, ...], dict[str, Any]]] = [
        ("must be", (q, q[:, :1], q[:, :1]), {}),
        ("one dtype", (q, q, q.half()), {}),
        ("table must be", (q, q, q, table.T), {}),
        ("do not fit", (q, q, q, table[:3]), {}),
        ("do not fit", (q, q, q, table), {"max_distance": 8}),
        ("shown must be", (q, q, q), {"shown": torch.ones(1, 3, dtype=torch.bool)}),
        ("shown must be bool", (q, q, q), {"shown": torch.ones(1, 4, dtype=torch.int64)}),
        ("one row", (q, q, q), {"offsets": (offsets, offsets), "shown": torch.ones(1, 4, dtype=torch.bool)}),
        ("same documents", (q, q, q), {"offsets": (offsets, torch.tensor([0, 2, 4]))}),
        ("dropout", (q, q, q), {"dropout": 1.0}),
    ]
    for message, given, named in wrong:
        with pytest.raises(ValueError, match=message):
            module.biased_attention(*given, **named)


@only_interpreted
def test_compiled_it_gives_the_same() -> None:
    torch.manual_seed(0)
    tensors = {name: torch.randn(1, 2, n, 8) for name, n in (("q", 20), ("k", 24), ("v", 24))}
    shown = (torch.rand(1, 24) < 0.8).to(DEVICE)

    def attend(**given: Tensor) -> Tensor:
        return module.biased_attention(**given, shown=shown, dropout=0.2, seed=7)

    same_when_compiled(attend, tensors | {"table": torch.randn(32, 2)})


TILES, FORWARD, BACKWARD = (f"_biased_attention_{name}" for name in ("tiles", "forward", "backward"))
K_LINE = "k += batch * k_b + head * k_h + first_k * k_s\n"
V_AND_OUT = "        v += batch * v_b + head * v_h + first_k * v_s\n        out +="
LEAD = "lead = (first_k % 8).to(tl.int32)\n        plane = batch * heads + head\n        shown +="
MUTANTS = [
    ("encoder", Mutant("scores shrink the wrong way", FORWARD,
            "shrink = tl.exp2(top - finite)",
            "shrink = tl.exp2(finite - top)")),
    ("encoder", Mutant("forward reads k a row further", FORWARD,
            K_LINE + V_AND_OUT,
            K_LINE.replace("first_k", "(first_k + 1)") + V_AND_OUT)),
    ("decoder", Mutant("no causal mask", TILES,
            "tl.where(distances <= 0, scores",
            "tl.where(distances <= 1, scores")),
    ("cross", Mutant("no mask of keys", TILES,
            "tl.where(seen[None, :], scores, float(",
            "tl.where(seen[None, :] | True, scores, float(")),
    ("encoder", Mutant("bias shifted", TILES,
            "tl.reshape(distances - lowest,",
            "tl.reshape(distances - lowest - 1,")),
    ("encoder", Mutant("near blocks end too soon", TILES,
            "start + BLOCK_M - 1 + RIGHT + lead, 0), BLOCK_N), near",
            "start - 1 + RIGHT + lead, 0), BLOCK_N), near")),
    ("documents", Mutant("beyond the last key", TILES,
            "    elif not WHOLE_KEYS:",
            "    elif SHOWN and not WHOLE_KEYS:")),
    ("documents", Mutant("blocks begin where the document does", FORWARD,
            LEAD,
            LEAD.replace("% 8", "% 8 * 0"))),
    ("encoder", Mutant("dq: sign of delta", BACKWARD,
            "ds = p * (dp - delta[:, None])",
            "ds = p * (dp + delta[:, None])")),
    ("encoder", Mutant("dq: rows beyond a block", BACKWARD,
            "tl.store(deltas + places, delta, mask=there)",
            "tl.store(deltas + places + 1, delta, mask=there)")),
    ("encoder", Mutant("bias: diagonals shifted", BACKWARD,
            "turned = tl.arange(0, N)[None, :] + own_m[:, None]",
            "turned = tl.arange(0, N)[None, :] + own_m[:, None] + 1")),
    ("encoder", Mutant("bias: tails swapped", BACKWARD,
            "left_rows += tl.where(block < near, added, 0.0)",
            "left_rows += tl.where(block < near, 0.0, added)")),
    ("encoder", Mutant("bias: the last sums are lost", BACKWARD,
            "mask=(distances > -LEFT) & (distances < RIGHT))",
            "mask=(distances > -LEFT) & (distances < 0))")),
    ("decoder", Mutant("dk, dv: begin one block late", BACKWARD,
            "begin = tl.minimum(tl.maximum(first - shift, 0) // BLOCK_M, end)",
            "begin = tl.minimum(tl.maximum(first - shift, 0) // BLOCK_M + 1, end)")),
    ("encoder", Mutant("dk: sign of delta", BACKWARD,
            "ds = p * (dp - delta[None, :])",
            "ds = p * (dp + delta[None, :])")),
    ("cross", Mutant("dk, dv: hidden keys have gradients", BACKWARD,
            "v_acc = tl.where(seen[:, None], v_acc, 0.0)",
            "v_acc = tl.where(seen[:, None], v_acc, v_acc)")),
    ("encoder", Mutant("dv: dropout is not turned", BACKWARD,
            "weights = tl.where(kept, p * keep_scale, 0.0)",
            "weights = tl.where(kept, p, 0.0)")),
    ("encoder", Mutant("kept: rows shifted", FORWARD,
            "% row_blocks * BLOCK_M + tl.arange(0, BLOCK_M)",
            "% row_blocks * BLOCK_M + 1 + tl.arange(0, BLOCK_M)")),
    ("encoder", Mutant("kept: one plane for all", FORWARD,
            "found = is_kept(seed, plane, rows,",
            "found = is_kept(seed, plane * 0, rows,")),
    ("encoder", Mutant("kept: the other way", FORWARD,
            "found.to(tl.uint8), mask=",
            "(found == 0).to(tl.uint8), mask=")),
]  # fmt: skip
"""Of which kind of attention the broken kernel must be noticed by, and what is broken."""


def check_all(kernels: Any, kind: str, dropout: bool) -> None:
    """What mutants are tried on."""
    for seed in (11, 9, 3):
        check(kernels, seed, kind, torch.float32, 0.2 if dropout else 0.0)


@only_interpreted
@pytest.mark.parametrize(("kind", "mutant"), MUTANTS, ids=lambda value: getattr(value, "what", value))
def test_broken_kernels_are_noticed(kind: str, mutant: Mutant, tmp_path: Path) -> None:
    dropout = any(word in mutant.what for word in ("kept", "dropout", "document"))
    assert is_noticed(mutant, lambda kernels: check_all(kernels, kind, dropout), tmp_path)
