"""Operations that this device computes no faster fused, at the sizes of this model: those are left to torch.

Measured on random numbers before the model is loaded, forward and backward, once for each device and size (see
`shardtune_kernels.calibration`). What is fused for the memory it saves, the loss and attention, is not measured.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional

from shardtune.fused.linears import base_of, has_adapter, is_four_bit, refusal
from shardtune.fused.mlp import NAMES
from shardtune.fused.norms import is_rms_norm
from shardtune_kernels import FourBitWeight, LoraWeights, calibration, lora_gated_mlp, lora_linear, reference, rms_norm


class Trial(NamedTuple):
    """An operation at one size, both ways."""

    op: str
    size: tuple[int, ...]
    ways: Mapping[str, Callable[[], object]]


def slower_ops(model: nn.Module, rows: int, dtype: torch.dtype, device: torch.device) -> dict[str, str]:
    """The operations that torch computes faster, and at which size; none where nothing is measured (see `choose`).

    `rows`: tokens that a rank computes on at once.
    """
    found = {}
    for trial in _trials(model, rows, dtype, device):
        if calibration.choose(f"model.{trial.op}", trial.size, dtype, device, trial.ways) == "torch":
            found[trial.op] = f"torch is faster here at {' x '.join(map(str, trial.size))}"
    return found


def _trials(model: nn.Module, rows: int, dtype: torch.dtype, device: torch.device) -> Iterator[Trial]:
    """Of each operation the size that is most frequent in the model."""
    adapters = Counter(
        _size(module) for module in model.modules() if has_adapter(module) and refusal(module, device) is None
    )
    if adapters:
        (outputs, inputs, rank, stored), _ = adapters.most_common(1)[0]
        layer = _layer(outputs, inputs, rank, stored, dtype, device)
        x = _random((rows, inputs), dtype, device)
        yield Trial("lora", (rows, outputs, inputs, rank), {
            "fused": _both_passes(lambda x, a, b: lora_linear(x, layer._replace(a=a, b=b)), x, layer.a, layer.b),
            "torch": _both_passes(lambda x, a, b: _plain(x, layer._replace(a=a, b=b)), x, layer.a, layer.b),
        })  # fmt: skip
    mlps = Counter(size for module in model.modules() if (size := _mlp_size(module, device)) is not None)
    if mlps:
        (width, inner, rank, stored), _ = mlps.most_common(1)[0]
        gate, up = (_layer(inner, width, rank, stored, dtype, device) for _ in range(2))
        down = _layer(width, inner, rank, stored, dtype, device)
        adapters_of = [t for layer in (gate, up, down) for t in (layer.a, layer.b) if t is not None]
        x = _random((rows, width), dtype, device)
        yield Trial("mlp", (rows, width, inner, rank), {
            "fused": _both_passes(lambda x, *_: lora_gated_mlp(x, gate, up, down), x, *adapters_of),
            "torch": _both_passes(
                lambda x, *_: _plain(functional.silu(_plain(x, gate)) * _plain(x, up), down), x, *adapters_of
            ),
        })  # fmt: skip
    norms: Counter[int] = Counter(
        module.get_parameter("weight").shape[0] for module in model.modules() if is_rms_norm(module)
    )
    if norms:
        ((width, _),) = norms.most_common(1)
        x, weight = _random((rows, width), dtype, device), _random((width,), dtype, device)
        yield Trial("norm", (rows, width), {
            "fused": _both_passes(lambda x: rms_norm(x, weight, 1e-6), x),
            "torch": _both_passes(lambda x: reference.rms_norm(x, weight, 1e-6), x),
        })  # fmt: skip


def _size(module: nn.Module) -> tuple[int, int, int, bool]:
    """Outputs, inputs, rank of the adapter (0: none), and whether the weight is in four bits."""
    base, lora = base_of(module), module if has_adapter(module) else None
    rank = next(iter(lora.lora_A.values())).weight.shape[0] if lora is not None else 0  # pyright: ignore
    return base.out_features, base.in_features, rank, is_four_bit(module)


def _mlp_size(module: nn.Module, device: torch.device) -> tuple[int, int, int, bool] | None:
    """Width, inner width, rank, and whether in four bits, of the last layer; None unless the module may be fused."""
    children = dict(module.named_children())
    names = next((names for names in NAMES if all(name in children for name in names)), None)
    if names is None or any(refusal(children[name], device) is not None for name in names):
        return None
    return _size(children[names[2]])


def _layer(outputs: int, inputs: int, rank: int, stored: bool, dtype: torch.dtype, device: torch.device) -> LoraWeights:
    weight: Any = _random((outputs, inputs), dtype, device).mul_(inputs**-0.5)
    if stored:
        from bitsandbytes.functional import quantize_4bit

        packed, state = quantize_4bit(weight, quant_type="nf4", compress_statistics=True)
        weight = FourBitWeight.from_bitsandbytes(packed, state)
    if not rank:
        return LoraWeights(weight)
    a, b = (_random(shape, torch.float32, device).mul_(0.01) for shape in ((rank, inputs), (outputs, rank)))
    return LoraWeights(weight, None, a.requires_grad_(), b.requires_grad_(), 2.0)


def _plain(x: Tensor, w: LoraWeights) -> Tensor:
    """What PEFT and bitsandbytes compute."""
    if isinstance(w.weight, FourBitWeight):
        import bitsandbytes

        y = bitsandbytes.matmul_4bit(x, w.weight.bytes.view(-1, 1), w.weight.to_bitsandbytes())
    else:
        y = functional.linear(x, w.weight)
    if w.a is None or w.b is None:
        return y
    return y + w.scale * functional.linear(functional.linear(x, w.a.to(x.dtype)), w.b.to(x.dtype))


def _both_passes(function: Callable[..., Any], x: Tensor, *parameters: Tensor | None) -> Callable[[], object]:
    """Forward and backward, for x and the parameters."""
    given = x.detach().requires_grad_()
    leaves = [given, *(parameter for parameter in parameters if parameter is not None)]

    def run() -> object:
        y = function(given, *parameters)
        return torch.autograd.grad(y, leaves, y.detach())

    return run


def _random(shape: tuple[int, ...], dtype: torch.dtype, device: torch.device) -> Tensor:
    generator = torch.Generator(device).manual_seed(0)  # the run's own random numbers stay what they are
    return torch.randn(shape, dtype=dtype, device=device, generator=generator)
