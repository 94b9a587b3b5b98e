"""Four-bit weights on one GPU, one JSON line: dequantization (G2) and linear layers (G3), beside bitsandbytes.

Dequantization counts the bytes it must move (packed weights and scales in, values out) against the bandwidth of a plain
copy. Linear layers, forward and with the gradient of x, run beside bitsandbytes' own and beside dequantization (ours)
with a product by cuBLAS. Before anything is timed, values and products of all dtypes are compared. `--small` tries
everything out on a CPU.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import torch
from _gpu_timing import DEVICE, ON_GPU, copy_bandwidth, error, header, in_turn, installed, met, parser, ratio, report
from torch import Tensor

from shardtune_kernels import FourBitWeight, calibration, four_bit_linear, nf4_dequantize, reference

SHARE, SMALL_RATIO, LINEAR_RATIO, LINEAR_RATIO_512 = 0.85, 2.0, 0.97, 1.2
PEERS = ["bitsandbytes"]
functional: Any = None
if installed("bitsandbytes"):
    import bitsandbytes.functional as functional
    from bitsandbytes import matmul_4bit


class Case:
    """A weight as both sides hold it."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, kind: Any = "nf4", nested: bool = True) -> None:
        n, k = shape
        self.packed = self.state = None
        if functional is not None:
            given = torch.randn(shape, dtype=dtype, device=DEVICE) / k**0.5
            self.packed, self.state = functional.quantize_4bit(given, quant_type=kind, compress_statistics=nested)
            self.weight = FourBitWeight.from_bitsandbytes(self.packed, self.state)
            return
        packed = torch.randint(256, (n * k // 2,), dtype=torch.uint8, device=DEVICE)
        scales = torch.rand(-(-n * k // 64), device=DEVICE) / k**0.5
        self.weight = FourBitWeight(packed, scales, shape, dtype, kind)
        if nested:
            codes, outer = (scales * 255).byte(), torch.rand(-(-len(scales) // 256), device=DEVICE)
            self.weight = FourBitWeight(packed, codes, shape, dtype, kind, 64, outer, outer.mean())

    def dequantize(self) -> Callable[[], Tensor] | None:
        """What bitsandbytes gives."""
        return None if functional is None else lambda: functional.dequantize_4bit(self.packed, self.state)

    def linear(self) -> Callable[[Tensor], Tensor] | None:
        """bitsandbytes' layer."""
        return None if functional is None else lambda x: matmul_4bit(x, self.packed, self.state)

    def moved_bytes(self) -> int:
        """Read and written by a dequantization."""
        parts = [self.weight.packed, self.weight.absmax, self.weight.nested_absmax]
        values = self.weight.shape[0] * self.weight.shape[1] * self.weight.dtype.itemsize
        return values + sum(part.numel() * part.itemsize for part in parts if part is not None)


def compare() -> dict[str, float]:
    """Fails where values differ from bitsandbytes' at all, or products from those in float64 by more than their dtype's
    rounding; the largest error of each dtype."""
    largest: dict[str, float] = {}
    kinds = itertools.product((torch.float32, torch.float16, torch.bfloat16), ("nf4", "fp4"), (False, True))
    for dtype, kind, nested in kinds:
        case = Case((192, 256), dtype, kind, nested)
        values, peer = nf4_dequantize(case.weight), case.dequantize()
        if not torch.equal(values, reference.dequantized(case.weight) if peer is None else peer()):
            raise SystemExit(f"values differ: {dtype} {kind} nested {nested}")
        for rows in (3, 130):
            x = torch.randn(rows, 256, device=DEVICE, dtype=dtype, requires_grad=True)
            y = four_bit_linear(x, case.weight)
            dy = torch.randn_like(y)
            (dx,) = torch.autograd.grad(y, x, dy)
            off = max(
                error(y.detach(), x.detach().double() @ values.double().T), error(dx, dy.double() @ values.double())
            )
            largest[str(dtype)] = max(off, largest.get(str(dtype), 0.0))
            # A GPU's matrix products in float32 may be those of TF32 where torch is told so; here it is not.
            if off > {torch.float32: 1e-5, torch.float16: 1e-3, torch.bfloat16: 6e-3}[dtype]:
                raise SystemExit(f"products differ by {off:.3g}: {dtype} {kind} nested {nested}, {rows} rows")
    return largest


def dequantization(shape: tuple[int, int], bandwidth: float | None, rounds: int) -> dict[str, Any]:
    """G2, in bfloat16, with nested scales."""
    case = Case(shape, torch.bfloat16)
    out = torch.empty(shape, dtype=torch.bfloat16, device=DEVICE)
    times = in_turn({"ours": lambda: nf4_dequantize(case.weight, out=out), "bitsandbytes": case.dequantize()}, rounds)
    speed = case.moved_bytes() / (times["ours"] or 1.0) * 1e3
    share, found = None if bandwidth is None else speed / bandwidth, ratio(times, "bitsandbytes")
    line = {
        "shape": shape, "milliseconds": times, "gigabytes_per_second": speed / 1e9 if ON_GPU else None,
        "share_of_copy": share, "ratio": found,
    }  # fmt: skip
    if shape[0] > 1024:
        return {**line, "target_share": SHARE, "met": met(share, SHARE)}
    return {**line, "target_ratio": SMALL_RATIO, "met": met(found, SMALL_RATIO)}


def linear(case: Case, rows: int, backward: bool, rounds: int) -> dict[str, Any]:
    """G3: x Wᵀ in bfloat16, and dy W."""
    n, k = case.weight.shape
    x = torch.randn(rows, k, device=DEVICE, dtype=torch.bfloat16, requires_grad=backward)
    dy = torch.randn(rows, n, device=DEVICE, dtype=torch.bfloat16)

    def plain() -> Any:
        y = x.detach() @ nf4_dequantize(case.weight).T
        return (y, dy @ nf4_dequantize(case.weight)) if backward else y

    def side(layer: Callable[[Tensor], Tensor] | None) -> Callable[[], Any] | None:
        if layer is None:
            return None
        return (lambda: torch.autograd.grad(layer(x), x, dy)) if backward else (lambda: layer(x))

    sides = {
        "ours": side(lambda x: four_bit_linear(x, case.weight)), "bitsandbytes": side(case.linear()),
        "dequantize + cuBLAS": plain,
    }  # fmt: skip
    times = in_turn(sides, rounds)
    ratios = {name: ratio(times, name) for name in list(sides)[1:]}
    known = [value for value in ratios.values() if value is not None]
    target = LINEAR_RATIO_512 if rows == 512 else LINEAR_RATIO
    return {
        "shape": (n, k), "rows": rows, "backward": backward, "milliseconds": times, "ratio": ratios,
        "target_ratio_to_the_better": target, "met": met(min(known), target),
    }  # fmt: skip


def main() -> None:
    given = parser(__doc__).parse_args()
    torch.manual_seed(0)
    errors = compare()
    bandwidth = copy_bandwidth()
    rounds = 1 if given.small else given.rounds
    dequantized = [(64, 128), (33, 64)] if given.small else [(14_336, 4096), (1024, 4096)]
    shapes = [(96, 128)] if given.small else [(14_336, 4096), (4096, 4096)]
    rows = (3, 70) if given.small else [1 << power for power in range(4, 14)]
    layers = {shape: Case(shape, torch.bfloat16) for shape in shapes}
    report({
        **header("gpu_four_bit", PEERS),
        "largest_relative_errors": errors,
        "copy_gigabytes_per_second": bandwidth and bandwidth / 1e9,
        "dequantize": [dequantization(shape, bandwidth, rounds) for shape in dequantized],
        "linear": [
            linear(case, m, backward, rounds) for backward in (False, True) for case in layers.values() for m in rows
        ],
        "ways": calibration.report(),
    })  # fmt: skip


if __name__ == "__main__":
    main()
