"""G7: T5's attention with relative positions, forward and backward, its bias trained or frozen: one JSON line.

Beside the maths of transformers' T5 attention, torch's scaled_dot_product_attention with the bias written out, and
flex_attention. What is timed begins at the table [buckets, heads]. Memory is what a forward and backward takes at most,
at growing lengths.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from _gpu_timing import DEVICE, ON_GPU, error, header, in_turn, met, parser, peak_bytes, ratio, report
from torch import Tensor
from torch.nn import functional

from shardtune_kernels import biased_attention, reference

TARGET_MS = 1.0
TARGETS = {"eager": 4.0, "sdpa": 1.8}
LINEAR = 1.1
"""How many times as much memory for each query the longest may take as the shortest."""
BUCKETS, MAX_DISTANCE = 32, 128
Attention = Callable[[Tensor, Tensor, Tensor, Tensor], Tensor]


class Case(NamedTuple):
    """Leaves and the gradient of the output."""

    inputs: tuple[Tensor, Tensor, Tensor, Tensor]
    grad: Tensor
    trained: bool


def main() -> None:
    arguments = parser(__doc__)
    given = arguments.parse_args()
    b, h, s, d = (1, 2, 40, 16) if given.small else (8, 32, 1024, 64)
    rounds = 1 if given.small else given.rounds
    lengths = (32, 64) if given.small else (1024, 2048, 4096)
    errors = {
        str(dtype).partition(".")[2]: errors_in(dtype) for dtype in (torch.float32, torch.float16, torch.bfloat16)
    }
    peers: dict[str, Attention | None] = {"ours": ours, "eager": eager, "sdpa": sdpa, "flex": flex(s)}
    cases: dict[str, Any] = {}
    for name, trained in (("frozen", False), ("trained", True)):
        case = random_case(b, h, s, d, trained, torch.bfloat16)
        sides = {side: None if f is None else runner(f, case) for side, f in peers.items()}
        if not works(sides["flex"]):
            sides["flex"] = None
        times = in_turn(sides, rounds, 1 if given.small else 5)
        ratios = {side: ratio(times, side) for side in ("eager", "sdpa", "flex")}
        cases[name] = {
            "milliseconds": times, "ratio": ratios,
            "met": {"milliseconds": met(times["ours"], TARGET_MS, at_most=True)}
            | {side: met(ratios[side], target) for side, target in TARGETS.items() if trained or side == "eager"},
        }  # fmt: skip
    dropout = runner(
        lambda *x: biased_attention(*x, dropout=0.1, seed=1), random_case(b, h, s, d, True, torch.bfloat16)
    )
    with_dropout = in_turn({"ours": dropout}, rounds, 1 if given.small else 5)
    peaks = {length: peak_bytes(runner(ours, random_case(b, h, length, d, True, torch.bfloat16))) for length in lengths}
    first, last = peaks[lengths[0]], peaks[lengths[-1]]
    growth = None if first is None or last is None else (last / lengths[-1]) / (first / lengths[0])
    report({
        **header("gpu_t5_attention"), "shape": {"b": b, "h": h, "s": s, "d": d}, "rounds": rounds, "errors": errors,
        "cases": cases, "dropout_0.1_trained_milliseconds": with_dropout["ours"],
        "targets": {"milliseconds": TARGET_MS, **TARGETS},
        "peak_bytes": {str(length): peak for length, peak in peaks.items()},
        "peak_bytes_for_each_query": {"longest_over_shortest": growth, "target": LINEAR,
                                      "met": met(growth, LINEAR, at_most=True)},
    })  # fmt: skip


def random_case(b: int, h: int, s: int, d: int, trained: bool, dtype: torch.dtype) -> Case:
    """As transformers lays them out: [b, s, h, d] in memory."""
    torch.manual_seed(0)
    q, k, v, grad = (torch.randn(b, s, h, d, device=DEVICE).to(dtype).transpose(1, 2) for _ in range(4))
    table = torch.randn(BUCKETS, h, device=DEVICE)
    q = q * d**-0.5  # T5 has no scale: its weights do that
    inputs = (*tuple(x.requires_grad_() for x in (q, k, v)), table.to(dtype).requires_grad_(trained))
    return Case(inputs, grad, trained)  # pyright: ignore[reportArgumentType]


def runner(attention: Attention, case: Case) -> Callable[[], Any]:
    """Forward and backward, as a training step does them."""
    leaves = [x for x in case.inputs if x.requires_grad]
    return lambda: torch.autograd.grad(attention(*case.inputs), leaves, case.grad)


def ours(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return biased_attention(q, k, v, table)


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


def flex(length: int) -> Attention | None:
    """Compiled, its bias looked up by a score function; the table's gradient is torch's. None without a GPU."""
    if not ON_GPU:
        return None
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


def works(side: Callable[[], Any] | None) -> bool:
    """Whether a peer runs here at all."""
    if side is None:
        return False
    try:
        side()
    except Exception as error_:
        print(f"bench: flex_attention does not run here: {error_}"[:500], file=sys.stderr)
        return False
    return True


def errors_in(dtype: torch.dtype) -> dict[str, float]:
    """Relative errors of output and gradients beside float64; ends the benchmark where one is too large."""
    case = random_case(1, 2, 70, 16, True, dtype)
    found = one_pass(ours, case.inputs, case.grad)
    wide = tuple(x.detach().double().requires_grad_() for x in case.inputs)
    truth = one_pass(reference_attention, wide, case.grad.double())
    errors = {name: error(found[name], truth[name]) for name in truth}
    limit = 1e-5 if dtype == torch.float32 else 0.02
    if max(errors.values()) > limit:
        raise SystemExit(f"bench: wrong in {dtype}: {errors}")
    return errors


def reference_attention(q: Tensor, k: Tensor, v: Tensor, table: Tensor) -> Tensor:
    return reference.biased_attention(q, k, v, table)


def one_pass(attention: Attention, inputs: tuple[Tensor, ...], grad: Tensor) -> dict[str, Tensor]:
    """Output and gradients by name."""
    q, k, v, table = inputs
    out = attention(q, k, v, table)
    return dict(
        zip(("out", "dq", "dk", "dv", "dtable"), (out.detach(), *torch.autograd.grad(out, inputs, grad)), strict=True)
    )


if __name__ == "__main__":
    main()
