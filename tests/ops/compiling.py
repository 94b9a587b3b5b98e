"""An op inside of torch.compile beside itself outside of it."""

from __future__ import annotations

import warnings
from collections.abc import Callable, Mapping

import torch
from comparing import DEVICE, Outputs, distance
from torch import Tensor


def same_when_compiled(op: Callable[..., Outputs], tensors: Mapping[str, Tensor], frozen: tuple[str, ...] = ()) -> None:
    """Fails unless outputs and gradients are the same, in one graph without a break."""
    found = []
    for function in (op, torch.compile(op, backend="aot_eager", fullgraph=True)):
        torch.manual_seed(0)
        trained = {n for n, t in tensors.items() if t.is_floating_point() and n not in frozen}
        own = {n: t.to(DEVICE).detach().clone().requires_grad_(n in trained) for n, t in tensors.items()}
        with warnings.catch_warnings():  # torch.compile makes an instance of the function, which torch warns of
            warnings.filterwarnings("ignore", "<class 'torch.autograd.function.Function'> should not be instantiated")
            outputs = function(**own)
        outputs = outputs if isinstance(outputs, tuple) else (outputs,)
        generator = torch.Generator().manual_seed(0)
        moving = [o for o in outputs if o.requires_grad]
        gradients = [torch.randn(o.shape, generator=generator).to(o.device, o.dtype) for o in moving]
        torch.autograd.backward(moving, gradients)
        found.append([*(o.detach() for o in outputs), *(t.grad for n, t in own.items() if n in trained)])
    for eager, compiled in zip(*found, strict=True):
        assert compiled is not None
        assert compiled.dtype == eager.dtype
        assert distance(compiled, eager) < 1e-6
    torch.compiler.reset()
