"""Bottleneck adapters inside a transformers model (Houlsby et al. 2019, arXiv:1902.00751).

This file stands alone: a copy of it lies beside the weights of a model that has adapters, so that

    AutoModelForSeq2SeqLM.from_pretrained(folder, trust_remote_code=True)

(or AutoModelForCausalLM, AutoModelForSequenceClassification) loads it with transformers and torch only. The model's
`config.json` says which linear layers have an adapter, and how wide it is.
"""

from __future__ import annotations

from typing import Any

import transformers
from torch import Tensor, nn

SETTINGS = "bottleneck_adapters"
"""The key of a model's config: {modules: names of the linear layers, size, activation, dropout}."""
ACTIVATIONS: dict[str, type[nn.Module]] = {"relu": nn.ReLU, "gelu": nn.GELU, "silu": nn.SiLU}
PREFIX = "Adapted"


class Bottleneck(nn.Module):
    """h + W_up a(W_down h + b_down) + b_up: h [..., d], W_down [r, d], W_up [d, r].

    W_up and the biases begin as zero, so that at first h stays as it is.
    """

    def __init__(self, width: int, size: int, activation: str, dropout: float, **where: Any) -> None:
        super().__init__()
        self.down = nn.Linear(width, size, **where)
        self.activation = ACTIVATIONS[activation]()
        self.dropout = nn.Dropout(dropout)
        self.up = nn.Linear(size, width, **where)
        nn.init.zeros_(self.down.bias)
        nn.init.zeros_(self.up.weight)
        nn.init.zeros_(self.up.bias)

    def forward(self, hidden: Tensor) -> Tensor:
        """The same shape."""
        return hidden + self.up(self.dropout(self.activation(self.down(hidden))))


def _adapt(linear: nn.Module, arguments: Any, output: Tensor) -> Tensor:
    return linear.adapter(output)  # pyright: ignore[reportCallIssue]


def attach(model: nn.Module, settings: dict[str, Any]) -> None:
    """Puts an adapter behind each linear layer of `settings["modules"]`, as its child: no other name changes."""
    for name in settings["modules"]:
        linear: Any = model.get_submodule(name)
        width = linear.out_features if isinstance(linear, nn.Linear) else linear.nf  # GPT-2's Conv1D
        linear.adapter = Bottleneck(
            width, settings["size"], settings["activation"], settings["dropout"],
            device=linear.weight.device, dtype=linear.weight.dtype,
        )  # fmt: skip
        linear.register_forward_hook(_adapt)


def adapted(base: type[transformers.PreTrainedModel]) -> type[transformers.PreTrainedModel]:
    """The class `base` with the adapters that its config names."""

    def __init__(self: Any, config: Any, *arguments: Any, **options: Any) -> None:
        base.__init__(self, config, *arguments, **options)
        attach(self, getattr(config, SETTINGS))

    members = {"__init__": __init__, "__module__": __name__, "__doc__": f"{base.__name__} with bottleneck adapters."}
    return type(PREFIX + base.__name__, (base,), members)


def __getattr__(name: str) -> Any:
    """`AdaptedX` for a class X of transformers: what a model's config asks this file for."""
    base = getattr(transformers, name.removeprefix(PREFIX), None) if name.startswith(PREFIX) else None
    if base is None:
        raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
    globals()[name] = adapted(base)
    return globals()[name]
