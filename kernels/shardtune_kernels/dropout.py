"""Dropout (Srivastava et al. 2014) that is drawn again from a seed where it is needed, and so is never stored.

16 random bits decide about an element, so the probability of a zero is a multiple of 2⁻¹⁶. In kernels they are those
of Philox (Salmon et al. 2011, "Parallel random numbers: as easy as 1, 2, 3") with the seed for a key and the row and
column for a counter: any tile can be drawn alone. Elsewhere they are those of a generator of torch.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import triton.language as tl
from torch import Tensor

from shardtune_kernels._launch import jit, on_triton, writes

STEPS = 1 << 16
"""Of 16 bits: probabilities are multiples of 1 / STEPS."""
PER_COUNTER = tl.constexpr(8)
"""Elements side by side that one counter decides about: Philox gives 128 bits."""
ROUNDS = tl.constexpr(7)
"""Of Philox: the fewest that pass all tests of randomness in the paper (table 2)."""


def draw_seed() -> int:
    """A seed from torch's random stream of the CPU, which activation recomputation sets back."""
    return int(torch.randint(1 << 31, (), device="cpu"))


def draw_seeds(count: int) -> Tensor:
    """int64 [count], as `draw_seed`; as a tensor, so that torch.compile draws new ones in each call."""
    return torch.randint(1 << 31, (count,), device="cpu")


def generator_of(seed: int, device: torch.device | str) -> torch.Generator:
    """Of torch, from a seed of 64 bits: a CPU's generator looks at the lower half, so the upper is folded into it."""
    return torch.Generator(device).manual_seed((seed ^ (seed >> 32) * 0x9E3779B1) & 0xFFFFFFFF)


def dropped_steps(rate: float) -> int:
    """The probability of a zero, in 1 / STEPS. Raises ValueError unless 0 <= rate < 1."""
    if not 0.0 <= rate < 1.0:
        raise ValueError(f"dropout is a share of what is set to zero, at least 0 and below 1, not {rate}")
    return min(round(rate * STEPS), STEPS - 1)


def dropout_mask(seed: int, rate: float, shape: Sequence[int], device: torch.device | str | None = None) -> Tensor:
    """bool [*shape], True where an element is kept: what ops given this seed and rate use for an input of this shape.

    The numbers on a GPU differ from those on a CPU.
    """
    kept = torch.empty(tuple(shape), dtype=torch.bool, device=device)
    flat = kept.view(-1, shape[-1]) if kept.numel() else kept
    draw_mask(flat, torch.tensor([seed], device="cpu"), 0, dropped_steps(rate))
    return kept


@writes("kept")
def draw_mask(kept: Tensor, seeds: Tensor, index: int, dropped: int) -> None:
    """kept bool [m, k]: the mask of seeds[index]."""
    if not kept.numel():
        return
    seed = int(seeds[index])
    if not on_triton(kept):
        words = torch.empty(-(-kept.numel() // 4), dtype=torch.int64, device=kept.device)
        words.random_(-(2**63), None, generator=generator_of(seed, kept.device))  # each decides about four
        torch.ge(words.view(torch.int16)[: kept.numel()].view(kept.shape), dropped - STEPS // 2, out=kept)
        return
    m, k = kept.shape
    _mask_kernel[-(-m // 32), -(-k // 128)](kept, m, k, seed, dropped, BM=32, BK=128)


@jit
def kept_tile(seed, rows, first, dropped, BM: tl.constexpr, BK: tl.constexpr):
    """bool [BM, BK]: which elements of int64 rows [BM] are kept, in the BK columns from `first`, a multiple of 8."""
    counters: tl.constexpr = BK // PER_COUNTER
    columns = (tl.arange(0, counters) + first // PER_COUNTER).to(tl.uint32)
    none = tl.zeros([BM, counters], tl.uint32)
    low, high = (rows & 0xFFFFFFFF).to(tl.uint32), (rows >> 32).to(tl.uint32)
    w0, w1, w2, w3 = tl.philox(seed, columns[None, :] + none, low[:, None] + none, high[:, None] + none, none, ROUNDS)
    words = tl.join(tl.join(w0, w1), tl.join(w2, w3))
    return tl.reshape(tl.join(words & 0xFFFF, words >> 16), [BM, BK]) >= dropped.to(tl.uint32)


@jit(do_not_specialize=["seed", "dropped"])
def _mask_kernel(kept_ptr, m, k, seed, dropped, BM: tl.constexpr, BK: tl.constexpr):
    rows = tl.program_id(0).to(tl.int64) * BM + tl.arange(0, BM)
    first = tl.program_id(1) * BK
    columns = first + tl.arange(0, BK)
    inside = (rows[:, None] < m) & (columns[None, :] < k)
    kept = kept_tile(seed, rows, first, dropped, BM, BK)
    tl.store(kept_ptr + rows[:, None] * k + columns[None, :], kept, mask=inside)
