"""G7: T5's attention with relative positions, forward and backward, its bias trained or frozen: one JSON line.

Beside the maths of transformers' T5 attention, torch's scaled_dot_product_attention with the bias written out, and
flex_attention. What is timed begins at the table [buckets, heads]. Memory is what a forward and backward takes at most,
at growing lengths.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import NamedTuple

import torch
from _gpu_line import Absent, Benchmark, Check, Sides, Target, case_of, errors
from _gpu_timing import DEVICE, ON_GPU, Work, peak_bytes
from torch import Tensor
from torch.nn import functional

from shardtune_kernels import biased_attention, reference

TARGET_MS = 1.0
FASTER = {"frozen": {"eager": 4.0}, "trained": {"eager": 4.0, "sdpa": 1.8}}
LINEAR = 1.1
"""How many times as much memory for each query the longest may take as the shortest."""
BUCKETS, MAX_DISTANCE = 32, 128
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Shape(NamedTuple):
    b: int
    h: int
    s: int
    d: int


def draw(shape: Shape) -> dict[str, Tensor]:
    """In float64, as transformers lays them out: [b, s, h, d] in memory; T5 has no scale, its weights do that."""
    b, h, s, d = shape
    drawn = {name: torch.randn(b, s, h, d).double().transpose(1, 2) for name in ("q", "k", "v")}
    return {**drawn, "q": drawn["q"] * d**-0.5, "table": torch.randn(BUCKETS, h).double()}


def step(attention: Attention, shape: Shape, trained: bool) -> Work:
    """Forward and backward, as a training step does them, in bfloat16."""
    torch.manual_seed(0)
    given = {name: tensor.to(DEVICE, torch.bfloat16) for name, tensor in draw(shape).items()}
    leaves = [tensor.requires_grad_(trained or name != "table") for name, tensor in given.items()]
    gradient = torch.randn_like(given["q"])
    return lambda: torch.autograd.grad(attention(**given), [x for x in leaves if x.requires_grad], gradient)


def written_out(q: Tensor, table: Tensor) -> Tensor:
    """[1, h, s, s]: the bias, buckets computed on the device as transformers does."""
    positions = torch.arange(q.shape[2], device=q.device)
    distances = positions[None, :] - positions[:, None]
    buckets = reference.buckets_of(distances, BUCKETS, MAX_DISTANCE, True)
    return functional.embedding(buckets, table).permute(2, 0, 1).unsqueeze(0)


def eager(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    """The maths of transformers' T5Attention."""
    scores = q @ k.transpose(3, 2) + written_out(q, table)
    return functional.softmax(scores.float(), dim=-1).type_as(scores) @ v


def sdpa(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return functional.scaled_dot_product_attention(q, k, v, written_out(q, table), scale=1.0)


def flex(length: int) -> Attention:
    """Compiled, its bias looked up by a score function; the table's gradient is torch's."""
    if not ON_GPU:
        raise Absent("is compiled for a GPU")
    from torch.nn.attention.flex_attention import flex_attention

    positions = torch.arange(length, device=DEVICE)
    buckets = reference.buckets_of(positions - positions[:, None], BUCKETS, MAX_DISTANCE, True)
    of_distance = torch.cat((buckets[-1, :-1], buckets[0]))
    compiled = torch.compile(flex_attention)

    def attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        def biased(score: Tensor, _: Tensor, head: Tensor, i: Tensor, j: Tensor) -> Tensor:
            return score + table[of_distance[j - i + length - 1], head]

        out = compiled(q, k, v, score_mod=biased, scale=1.0)
        assert isinstance(out, Tensor)
        return out

    return attention


def main() -> None:
    bench = Benchmark("G7", __doc__)
    checked = Shape(1, 2, 40, 16) if bench.small else Shape(2, 3, 500, 64)
    bench.correct(errors([
        Check("biased_attention", biased_attention, reference.biased_attention, lambda: draw(checked))
    ]))  # fmt: skip
    shape = Shape(1, 2, 40, 16) if bench.small else Shape(8, 32, 1024, 64)

    def limit(times: Mapping[str, float]) -> dict[str, Target]:
        return {"milliseconds": Target(times["ours"], TARGET_MS, at_most=True)}

    def dropped(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
        return biased_attention(q, k, v, table, dropout=0.1, seed=1)

    cases = []
    for bias, faster in FASTER.items():
        peers = {"ours": biased_attention, "eager": eager, "sdpa": sdpa}
        makers = {name: lambda of=of, bias=bias: step(of, shape, bias == "trained") for name, of in peers.items()}
        makers["flex"] = lambda bias=bias: step(flex(shape.s), shape, bias == "trained")
        cases.append(bench.case(Sides(makers), faster, limit, shape=shape._asdict(), bias=bias, dropout=0.0))
    alone = bench.case(Sides({"ours": lambda: step(dropped, shape, True)}), shape=shape._asdict(), dropout=0.1)
    lengths = (16, 32) if bench.small else (1024, 2048, 4096)
    peaks = {s: peak_bytes(step(biased_attention, shape._replace(s=s), True)) for s in lengths}
    first, last = peaks[lengths[0]], peaks[lengths[-1]]
    growth = Target(first and last and (last / lengths[-1]) / (first / lengths[0]), LINEAR, at_most=True)
    cases.append(case_of(
        {"ours": None}, {}, targets={"bytes a query, longest over shortest": growth}, what="memory at growing lengths",
        peak_bytes=peaks,
    ))  # fmt: skip
    bench.report(cases, with_dropout={"ours_ms": alone["ours_ms"], "dropout": 0.1})


if __name__ == "__main__":
    main()
