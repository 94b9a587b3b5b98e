"""G2 and G3: dequantization of four-bit weights, and linear layers on them, beside bitsandbytes: one JSON line.

Dequantization counts the bytes it must move (packed weights and scales in, values out) against the bandwidth of a plain
copy. Linear layers, forward and with the gradient of x, run beside bitsandbytes' own and beside dequantization (ours)
with a product by cuBLAS; what they should reach is a share of the speed of the better of the two.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable
from typing import Any

import bitsandbytes.functional as functional
import torch
from _gpu_line import Benchmark, Check, Sides, Target, errors, normal
from _gpu_timing import ON_GPU, Work, copy_bandwidth
from bitsandbytes import matmul_4bit
from torch import Tensor

from shardtune_kernels import FourBitWeight, LoraWeights, calibration, four_bit_linear, nf4_dequantize, reference

SHARE, SMALL_RATIO, LINEAR_RATIO, LINEAR_RATIO_512 = 0.85, 2.0, 0.97, 1.2


class Case:
    """A weight as both sides hold it."""

    def __init__(self, shape: tuple[int, int], dtype: torch.dtype, kind: str = "nf4", nested: bool = True) -> None:
        given = normal(*shape, dtype=dtype) / shape[1] ** 0.5
        quantize: Any = functional.quantize_4bit
        self.packed, self.state = quantize(given, quant_type=kind, compress_statistics=nested)
        self.weight = FourBitWeight.from_bitsandbytes(self.packed, self.state)

    def moved_bytes(self) -> int:
        """Read and written by a dequantization."""
        parts = [self.weight.packed, self.weight.absmax, self.weight.nested_absmax]
        values = self.weight.shape[0] * self.weight.shape[1] * self.weight.dtype.itemsize
        return values + sum(part.numel() * part.itemsize for part in parts if part is not None)


def checks() -> list[Check]:
    """Of products; values are compared with bitsandbytes' here: they must be the same, bit for bit."""
    found = []
    kinds = itertools.product((torch.float32, torch.float16, torch.bfloat16), ("nf4", "fp4"), (False, True))
    for dtype, kind, nested in kinds:
        case = Case((192, 256), dtype, kind, nested)
        name = f"{dtype} {kind} nested {nested}"
        if not torch.equal(nf4_dequantize(case.weight), functional.dequantize_4bit(case.packed, case.state)):
            raise SystemExit(f"gpu_four_bit: values are not those of bitsandbytes: {name}")
        for rows in (3, 130):
            found.append(Check(
                f"{name}, {rows} rows", lambda x, w=case.weight: four_bit_linear(x, w),
                lambda x, w=case.weight: reference.lora_linear(x, LoraWeights(w, None)),
                lambda rows=rows: {"x": torch.randn(rows, 256).double()}, only=[dtype],
            ))  # fmt: skip
    return found


def dequantization(bench: Benchmark, shape: tuple[int, int], bandwidth: float | None) -> dict[str, Any]:
    """G2, in bfloat16, with nested scales."""
    case = Case(shape, torch.bfloat16)
    out = torch.empty(shape, dtype=torch.bfloat16, device=case.packed.device)
    sides = Sides({
        "ours": lambda: lambda: nf4_dequantize(case.weight, out=out),
        "bitsandbytes": lambda: lambda: functional.dequantize_4bit(case.packed, case.state),
    })  # fmt: skip

    def share(times: Any) -> dict[str, Target]:
        speed = case.moved_bytes() / times["ours"] * 1e3
        return {"share of a copy's bandwidth": Target(speed / bandwidth if bandwidth else None, SHARE)}

    whole = shape[0] > 1024
    said = {"what": "dequantize", "number": "G2", "shape": shape, "bytes": case.moved_bytes()}
    return bench.case(sides, None if whole else {"bitsandbytes": SMALL_RATIO}, share if whole else None, **said)


def linear(bench: Benchmark, case: Case, rows: int, backward: bool) -> dict[str, Any]:
    """G3: x Wᵀ in bfloat16, and dy W."""
    n, k = case.weight.shape
    x, dy = normal(rows, k, trained=backward), normal(rows, n)

    def side(layer: Callable[[Tensor], Tensor]) -> Callable[[], Work]:
        return lambda: (lambda: torch.autograd.grad(layer(x), x, dy)) if backward else (lambda: layer(x))

    def plain() -> Any:
        y = x.detach() @ nf4_dequantize(case.weight).T
        return (y, dy @ nf4_dequantize(case.weight)) if backward else y

    sides = Sides({
        "ours": side(lambda x: four_bit_linear(x, case.weight)),
        "bitsandbytes": side(lambda x: matmul_4bit(x, case.packed, case.state)),
        "dequantize + cuBLAS": lambda: plain,
    })  # fmt: skip

    def beside_the_better(times: Any) -> dict[str, Target]:
        peers = [taken for name, taken in times.items() if name != "ours"]
        found = min(peers) / times["ours"] if len(peers) == 2 else None
        return {"the better's time": Target(found, LINEAR_RATIO_512 if rows == 512 else LINEAR_RATIO)}

    said = {"what": "linear", "number": "G3", "shape": (n, k), "rows": rows, "backward": backward}
    return bench.case(sides, targets=beside_the_better, **said)


def main() -> None:
    bench = Benchmark("G2, G3", __doc__, ["bitsandbytes"])
    bench.correct(errors(checks()))
    bandwidth = copy_bandwidth()
    shapes = [(64, 128), (33, 64)] if bench.small else [(14_336, 4096), (1024, 4096)]
    cases = [dequantization(bench, shape, bandwidth) for shape in shapes]
    rows = (3, 70) if bench.small else [1 << power for power in range(4, 14)]
    for shape in [(96, 128)] if bench.small else [(14_336, 4096), (4096, 4096)]:
        case = Case(shape, torch.bfloat16)
        cases += [linear(bench, case, m, backward) for backward in (False, True) for m in rows]
    bench.report(
        cases, copy_gigabytes_per_second=bandwidth / 1e9 if bandwidth else None,
        ways=calibration.report() if ON_GPU else None,
    )  # fmt: skip


if __name__ == "__main__":
    main()
