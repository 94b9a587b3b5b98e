"""pad, pack and unpad give exactly what their references give."""

from __future__ import annotations

import itertools
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from comparing import DEVICE, seed_everything
from compiling import same_when_compiled
from mutants import Mutant, is_noticed, only_interpreted
from torch import Tensor

import shardtune_kernels
from shardtune_kernels import reference

SEEDS = [random.SystemRandom().randrange(2**31) for _ in range(8)]
FIXED = range(6)
"""Seeds that notice every broken kernel."""
INTEGERS = [torch.int32, torch.int64]
DTYPES = [
    torch.float32, torch.float16, torch.bfloat16, torch.float64, torch.int32, torch.int64, torch.uint8, torch.bool,
    torch.complex64, torch.complex128,
]  # fmt: skip


def ragged(rng: random.Random, least: int = 0) -> tuple[list[int], Tensor]:
    """Lengths of rows, some of them empty, and where they begin and end."""
    rows = rng.choice([0, 1, 2, 3, 9]) if not least else rng.randint(least, 9)
    lengths = [rng.choice([0, 1, 2, rng.randint(0, 90)]) for _ in range(rows)]
    return lengths, torch.tensor([0, *itertools.accumulate(lengths)], dtype=rng.choice(INTEGERS), device=DEVICE)


def stream(rng: random.Random, lengths: list[int]) -> tuple[Tensor, list[dict[str, Any]]]:
    """Tokens, a third of them not learned, and options of pad and pack."""
    tokens = torch.randint(-50, 100, (sum(lengths),), dtype=rng.choice(INTEGERS), device=DEVICE)
    first = torch.randint(0, 9, (len(lengths),), dtype=rng.choice(INTEGERS), device=DEVICE)
    return tokens, [
        {"learned_from": learned_from, "start": start, "ignore_index": rng.choice([-100, -1])}
        for learned_from, start in itertools.product((None, first), (None, 7))
    ]


def same(got: Any, wanted: Any, said: object) -> None:
    """All five, with their dtypes."""
    for name, part, other in zip(got._fields, got, wanted, strict=True):
        assert part.dtype == torch.int64
        assert torch.equal(part, other), f"{name}: {said}"


def check_pad(kernels: Any, seed: int) -> None:
    rng = seed_everything(seed)
    lengths, offsets = ragged(rng, least=seed % 3)
    tokens, options = stream(rng, lengths)
    for how in options:
        width = rng.choice([0, 1, 5, max(lengths, default=0), 97, 300])
        how |= {"fill": rng.choice([0, 42]), "left": rng.random() < 0.5}
        got, wanted = kernels.pad(tokens, offsets, width, **how), reference.pad(tokens, offsets, width, **how)
        same(got, wanted, f"seed {seed}, lengths {lengths}, width {width}, {how}")


def check_pack(kernels: Any, seed: int) -> None:
    rng = seed_everything(seed)
    lengths, offsets = ragged(rng, least=seed % 3)
    if seed % 2:  # more than one program
        lengths = [*lengths, 280]
        offsets = torch.cat((offsets, offsets[-1:] + 280))
    tokens, options = stream(rng, lengths)
    behind = torch.cat((tokens, tokens.new_full((3,), 5)))  # in no row
    for how in options:
        got, wanted = kernels.pack(tokens, offsets, **how), reference.pack(tokens, offsets, **how)
        same(got, wanted, f"seed {seed}, lengths {lengths}, {how}")
        got = kernels.pack(behind, offsets, **how)
        values = (0, how["ignore_index"], 0, 0, -1)
        assert [part[0, len(tokens) :].tolist() for part in got] == [[value] * 3 for value in values], seed


def rows_for(rng: random.Random, lengths: list[int], dtype: torch.dtype) -> Tensor:
    """[b, width, ...], at least as wide as the longest."""
    trailing = rng.choice([(), (3,), (2, 5), (1,), (0,), (300,)])
    shape = len(lengths), max(lengths, default=0) + rng.randint(0, 3), *trailing
    return torch.randint(0, 200, shape, device=DEVICE).to(dtype)


def check_unpad(kernels: Any, seed: int) -> None:
    rng = seed_everything(seed)
    lengths, offsets = ragged(rng, least=1 + seed % 2)
    for dtype in rng.sample(DTYPES, 4):
        rows, left = rows_for(rng, lengths, dtype), rng.random() < 0.5
        got = kernels.unpad(rows, offsets, rng.choice([None, sum(lengths)]), left)
        said = f"seed {seed}, lengths {lengths}, rows {list(rows.shape)}, {dtype}, left {left}"
        assert got.dtype == dtype, said
        assert torch.equal(got, reference.unpad(rows, offsets, left)), said
    # A row longer than there is room: what is not there is 0.
    cut = torch.arange(1, 1 + 2 * 4, device=DEVICE).view(2, 4)
    offsets = torch.tensor([0, 6, 9], device=DEVICE)
    assert kernels.unpad(cut, offsets).tolist() == [1, 2, 3, 4, 0, 0, 5, 6, 7]
    assert kernels.unpad(cut, offsets, 9, left=True).tolist() == [0, 0, 1, 2, 3, 4, 6, 7, 8]
    for left in (False, True):  # rows longer than there is width for
        assert torch.equal(reference.unpad(cut, offsets, left), kernels.unpad(cut, offsets, 9, left))


def check_unpad_gradient(kernels: Any, seed: int) -> None:
    rng = seed_everything(seed)
    lengths, offsets = ragged(rng, least=1 + seed % 2)
    for dtype in (torch.float32, torch.float16, torch.bfloat16):
        rows, left = rows_for(rng, lengths, dtype), rng.random() < 0.5
        truth = torch.zeros_like(rows)
        gradient = torch.randn(sum(lengths), *rows.shape[2:], device=DEVICE).to(dtype)
        for row, part in enumerate(gradient.split(lengths)):
            truth[row, slice(rows.shape[1] - len(part), None) if left else slice(len(part))] = part
        leaf = rows.requires_grad_()
        kernels.unpad(leaf, offsets, sum(lengths), left).backward(gradient)
        said = f"seed {seed}, lengths {lengths}, rows {list(rows.shape)}, {dtype}, left {left}"
        assert leaf.grad is not None
        assert torch.equal(leaf.grad, truth), said


CHECKS = {"pad": check_pad, "pack": check_pack, "unpad": check_unpad, "unpad-gradient": check_unpad_gradient}


@pytest.mark.parametrize("seed", SEEDS, ids=range(len(SEEDS)))
@pytest.mark.parametrize("what", CHECKS)
def test_as_the_reference(what: str, seed: int) -> None:
    CHECKS[what](shardtune_kernels, seed)


@pytest.mark.parametrize("start", [None, 3])
def test_nothing(start: int | None) -> None:
    tokens = torch.zeros(0, dtype=torch.int32, device=DEVICE)
    for rows in (0, 2):
        offsets = torch.zeros(rows + 1, dtype=torch.int32, device=DEVICE)
        same(shardtune_kernels.pad(tokens, offsets, 0), reference.pad(tokens, offsets, 0), rows)
        same(
            shardtune_kernels.pad(tokens, offsets, 3, start=start, fill=1),
            reference.pad(tokens, offsets, 3, start=start, fill=1),
            rows,
        )
        same(shardtune_kernels.pack(tokens, offsets), reference.pack(tokens, offsets), rows)
        wide = torch.ones(rows, 4, 2, device=DEVICE, requires_grad=True)
        flat = shardtune_kernels.unpad(wide, offsets)
        assert flat.shape == (0, 2)
        flat.sum().backward()
        assert wide.grad is not None
        assert not wide.grad.any()


def test_not_contiguous() -> None:
    tokens, offsets = torch.randint(-9, 9, (14,), device=DEVICE), torch.tensor([0, 9, 3, 9, 7, 9], device=DEVICE)
    first = torch.tensor([1, 9, 0, 9], device=DEVICE)[::2]
    given = tokens[::2], offsets[::2]
    same(
        shardtune_kernels.pad(*given, 5, learned_from=first),
        reference.pad(*given, 5, learned_from=first),
        tokens,
    )
    same(shardtune_kernels.pack(*given, learned_from=first), reference.pack(*given, learned_from=first), tokens)
    rows = torch.randn(4, 2, 6, device=DEVICE).permute(1, 2, 0).requires_grad_()
    assert torch.equal(shardtune_kernels.unpad(rows, offsets[::2]), reference.unpad(rows, offsets[::2]))
    expanded = torch.ones((), device=DEVICE).expand(7, 4)  # a gradient with no memory of its own
    (gradient,) = torch.autograd.grad(shardtune_kernels.unpad(rows, offsets[::2]), rows, expanded)
    assert gradient.sum() == 7 * 4


def test_no_gradient_that_nobody_needs() -> None:
    offsets = torch.tensor([0, 1, 3], device=DEVICE)
    assert not shardtune_kernels.unpad(torch.ones(2, 2, device=DEVICE), offsets).requires_grad
    assert not shardtune_kernels.unpad(torch.ones(2, 2, dtype=torch.int64, device=DEVICE), offsets).requires_grad


def test_there_and_back() -> None:
    rng = seed_everything(5)
    lengths, offsets = ragged(rng, least=3)
    tokens = torch.randint(0, 100, (sum(lengths),), device=DEVICE)
    for left in (False, True):
        rows = shardtune_kernels.pad(tokens, offsets, max(lengths), left=left)
        assert torch.equal(shardtune_kernels.unpad(rows.input_ids, offsets, left=left), tokens)


def ones(*shape: int, dtype: torch.dtype = torch.int64) -> Tensor:
    return torch.ones(shape, dtype=dtype, device=DEVICE)


@pytest.mark.parametrize(
    ("call", "said"),
    [
        (lambda k: k.pad(ones(3, 1), ones(2), 4), r"tokens are torch.int64 \[3, 1\]"),
        (lambda k: k.pad(ones(3, dtype=torch.int16), ones(2), 4), "tokens are torch.int16"),
        (lambda k: k.pad(ones(3), ones(0), 4), r"offsets are torch.int64 \[0\]"),
        (lambda k: k.pack(ones(3), ones(2, dtype=torch.float32)), "offsets are torch.float32"),
        (lambda k: k.pad(ones(3), ones(2), -1), "width is -1"),
        (lambda k: k.pack(ones(3), ones(2), learned_from=ones(2)), r"learned_from is torch.int64 \[2\].*\[1\]"),
        (lambda k: k.pack(ones(3), ones(2, dtype=torch.int64).to("meta")), "offsets are on meta"),
        (lambda k: k.pack(ones(3), ones(2), learned_from=ones(1).to("meta")), "learned_from is on meta"),
        (lambda k: k.unpad(ones(3), ones(4)), "rows have 1 dimensions"),
        (lambda k: k.unpad(ones(3, 2), ones(3)), "3 rows need 4 offsets, not 3"),
        (lambda k: k.unpad(ones(3, 2), ones(4), -2), "total is -2"),
    ],
)
def test_what_does_not_fit_is_refused(call: Callable[[Any], object], said: str) -> None:
    with pytest.raises(ValueError, match=said):
        call(shardtune_kernels)


def test_compiled() -> None:
    """With nothing left out of the graph, and the same."""

    def all_three(tokens: Tensor, offsets: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
        padded = shardtune_kernels.pad(tokens, offsets, 6, start=2, learned_from=offsets[1:])
        packed = shardtune_kernels.pack(tokens, offsets)
        return *padded, *packed, shardtune_kernels.unpad(rows, offsets, 9, left=True)

    tokens = torch.randint(-9, 50, (9,), dtype=torch.int32)
    offsets = torch.tensor([0, 4, 4, 9], dtype=torch.int32)
    same_when_compiled(all_three, {"tokens": tokens, "offsets": offsets, "rows": torch.randn(3, 5, 2)})


K = "_padding_kernels"
MUTANTS = {
    "pad": [
        Mutant("sign of what is not learned", K, "tl.where(own < 0, ~own, own)", "tl.where(own < 0, -own, own)"),
        Mutant("columns beyond the width", K, "keep = column < width", "keep = column >= 0"),
        Mutant("label of the token after next", K, "target_place = place + 1", "target_place = place + 2"),
        Mutant("last token", K, "keep & (place >= 0) & (place < length)", "keep & (place >= 0) & (place <= length)"),
        Mutant("label across rows", K, "mask=inside & (target_place < length), other=-1", "mask=inside, other=-1"),
        Mutant("first learned token", K, "target_place >= first", "target_place > first"),
        Mutant("shift of a decoder's inputs", K, "tokens + low + place - 1", "tokens + low + place"),
        Mutant("side of the padding", K, "column - tl.maximum(", "column + tl.maximum("),
    ],
    "pack": [
        Mutant("sign of what is not learned", K, "tl.where(own < 0, ~own, own)", "tl.where(own < 0, -own, own)"),
        Mutant("positions beyond the end", K, "keep = position < total", "keep = position >= 0"),
        Mutant("tokens in no row", K, "inside = keep & (row < rows)", "inside = keep"),
        Mutant("edges of rows", K, "other=0) <= position)", "other=0) < position)"),
        Mutant("one row off", K, "low = tl.where(ended, middle + 1, low)", "low = tl.where(ended, middle, low)"),
        Mutant("positions in a row", K, "position - low, low, length", "position + low, low, length"),
    ],
    "unpad": [
        Mutant("sign of the padding's width", K, "place = place + width -", "place = place - width +"),
        Mutant("entries that are not there", K, "found = found & (place >= 0) & (place < width)", "found = found"),
        Mutant("one place off", K, "at = (row * width + place)", "at = (row * width + place + 1)"),
        Mutant("edges of rows", K, "other=0) <= position)", "other=0) < position)"),
    ],
    "unpad-gradient": [
        Mutant("sign of the padding's width", K, "place = at - (width - length)", "place = at + (width - length)"),
        Mutant("gradient of padding", K, "(place >= 0) & (place < length) & (low", "(place >= 0) & (low"),
        Mutant("one place off", K, "index = (low + place) * inner", "index = (low + place + 1) * inner"),
    ],
}


@only_interpreted
@pytest.mark.parametrize(
    ("what", "mutant"),
    [pytest.param(what, m, id=f"{what}-{m.what}") for what, mutants in MUTANTS.items() for m in mutants],
)
def test_a_broken_kernel_is_noticed(what: str, mutant: Mutant, tmp_path: Path) -> None:
    def check(kernels: Any) -> None:
        for seed in FIXED:
            CHECKS[what](kernels, seed)

    assert is_noticed(mutant, check, tmp_path), mutant.what
