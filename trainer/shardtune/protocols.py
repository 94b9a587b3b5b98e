"""The four seams: what a task, a tuning method, a strategy and a batching are to the rest of the program.

Shape legend, used wherever tensors are named: b batch, s source length, t target length, v vocabulary,
c classes, d model width, r rank of LoRA.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from types import MappingProxyType
from typing import TYPE_CHECKING, Any, NamedTuple, Protocol

if TYPE_CHECKING:  # so that reading and checking data does not wait for torch
    import numpy as np
    import torch
    from numpy.typing import NDArray
    from peft import PeftConfig
    from torch import Tensor, nn

    from shardtune.examples import Batch, Budget, Encoded, Text, Tokens
    from shardtune.quantization import Quantization
    from shardtune.world import World

BESIDE = "trained_encoder.safetensors"
"""The file of what stands beside an adapter: see `Adapter.beside`."""


class Generation(NamedTuple):
    """How texts are generated."""

    max_new_tokens: int
    beams: int = 1
    """1 is greedy, or drawn."""
    in_step: bool = False
    """Whether all ranks must call the model equally often, because each holds only a part of it."""
    min_new_tokens: int = 0
    length_penalty: float = 1.0
    """Of beam search: texts are compared by the sum of their log probabilities over length ** this. Like the two
    around it, it leaves the model's own setting as it is where it is not given."""
    no_repeat_ngram: int = 0
    """So many tokens in a row are written once only; 0: they may be again."""
    temperature: float = 0.0
    """0: nothing is drawn; above, tokens are, from the probabilities of logits / temperature."""
    top_k: int | None = None
    top_p: float | None = None
    stop: Sequence[str] = ()
    """A text ends before one of these."""
    seed: int = 0
    """Of what is drawn; with the example's number in its split (`Tokens.number`) it decides the text, whatever the
    batch and the ranks."""
    counts: Callable[[int], None] | None = None
    """Told how many tokens were written, padding not among them."""


class Shard(NamedTuple):
    """This rank's part of a trained parameter; every element of the parameter is in the part of one rank."""

    name: str
    start: int
    """Where the part begins in the flattened parameter."""
    value: Tensor
    """float32, 1-D; to be read only."""
    gradient: Tensor | None
    """Of the step, 1-D, as long as `value`; there from the step's last `backward` to its `step`."""


VALUE = ""
"""`Piece.what` of the parameter itself."""


class Piece(NamedTuple):
    """This rank's part of a tensor that a checkpoint keeps: of a parameter, or of what belongs to it.

    Every element of a tensor is in the piece of one rank, in one range of the flattened tensor.
    """

    name: str
    """The parameter's, as the tuned model has it."""
    what: str
    """VALUE, or what the optimizer or the tuning method calls it, such as exp_avg."""
    shape: tuple[int, ...]
    """Of the whole tensor; () of a number."""
    start: int
    """Where the part begins in the flattened tensor."""
    values: Tensor
    """1-D, contiguous, on any device, in the dtype that is kept: the memory that training works on, not a copy."""


class Saved(Protocol):
    """What a checkpoint holds, read by ranges."""

    @property
    def step(self) -> int:
        """Optimizer steps done."""
        ...

    @property
    def tuning(self) -> dict[str, Any]:
        """What the method remembers; see `Tuning.remembered`."""
        ...

    def whats(self, name: str) -> dict[str, tuple[int, ...]]:
        """What is there of parameter `name`, each with the shape of the whole tensor; empty where nothing is."""
        ...

    def read(self, name: str, what: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened tensor, 1-D, on the CPU, in the dtype kept."""
        ...


class Task(Protocol):
    """What the model learns to do: from texts to tokens, to a loss, and back to texts."""

    scores_texts: bool
    """Whether `predict` gives texts or labels that metrics can compare with references."""

    def encode(self, texts: Sequence[Text]) -> list[Encoded]:
        """Token ids of each text; an empty target is not known, for `predict`. Raises DataError naming the place of a
        text that cannot be used."""
        ...

    def collate(self, examples: Sequence[Tokens], packed: bool = False) -> Batch:
        """A row for each example, padded to the longest of them; or, `packed`, all of them in one row without padding,
        kept apart by the batch's `documents`."""
        ...

    def loss_sum(self, model: nn.Module, batch: Batch) -> Tensor:
        """The float32 sum of the targets' cross entropies (natural log), a scalar."""
        ...

    def losses(self, model: nn.Module, batch: Batch) -> Tensor:
        """Of each example the sum that `loss_sum` adds up over all of them: float32, [b]; the batch is not packed."""
        ...

    def targets(self, example: Tokens) -> int:
        """Over how many targets the loss of an example is a mean."""
        ...

    def predict(self, model: nn.Module, examples: Sequence[Tokens], how: Generation) -> list[str]:
        """What the model writes, or which class it names, for each source. On sharded models, ranks call
        this the same number of times, each with at least one example."""
        ...

    def as_written(self, texts: Sequence[Text], predictions: Sequence[str]) -> list[str]:
        """The predictions as people read them, for tasks that need the text for that; the first rank calls it alone."""
        ...

    def references(self, text: Text) -> list[str]:
        """The right predictions; where there are several, each is as good, and the first is shown."""
        ...


class Adapter(NamedTuple):
    """An adapter as its folder holds it; tensors are whole, on the CPU."""

    tensors: dict[str, Tensor]
    """Those of `adapter_model.safetensors`."""
    settings: PeftConfig
    """What `adapter_config.json` is to say."""
    beside: Mapping[str, Tensor] = MappingProxyType({})
    """What PEFT does not read, but a run that goes on from there (`tuning.from`) does: the trained parameters that
    `tensors` were computed by."""


class Tuning(Protocol):
    """Which parameters are trained, and what they begin as."""

    makes_adapter: bool
    """Whether the result is an adapter that PEFT loads beside the base model, or a model itself."""
    quantization: Quantization | None
    """What the frozen linear layers are stored as; None: what the model computes in."""
    trained_dtype: torch.dtype
    """What the trained parameters are stored in."""

    def apply(self, model: nn.Module) -> nn.Module:
        """Adds what the method adds and sets `requires_grad` of every parameter; the model is on the meta
        device. Raises ConfigError where nothing matches, or the model cannot be tuned so."""
        ...

    def initial(self, model: nn.Module, weights: Weights, world: World) -> Weights:
        """The values of the applied `model` to start from, given those of the unquantized base and of the plain
        initialization. All ranks call it and get the same."""
        ...

    def result(self, model: nn.Module, trained: dict[str, Tensor], initial: Weights) -> Adapter:
        """The adapter, of a method that makes one, given the trained parameters, whole and float32, by the names of the
        applied `model`; `initial`: what all began from. The first rank calls it alone. A parameter that is saved as it
        is stays the same object: so a model on the meta device tells which tensor of a file belongs where."""
        ...

    def lr_scale(self, name: str) -> float:
        """What the learning rate of a trained parameter is multiplied by."""
        ...

    def notes(self) -> list[str]:
        """Lines to say at the start, after `apply`: what was matched."""
        ...

    def remembered(self) -> dict[str, Any]:
        """What a run that goes on from a checkpoint must know before `apply`: JSON-like, the same on every rank."""
        ...

    def recall(self, saved: Saved) -> None:
        """Before `apply`: takes what the run that is gone on with had found out (see `remembered`, `pieces`), so that
        it is not sought anew."""
        ...

    def pieces(self, world: World) -> Iterator[Piece]:
        """What the method itself keeps in a checkpoint, beside what the strategy keeps of trained parameters."""
        ...

    def in_training(self, task: Task, strategy: Strategy, total_steps: int, world: World) -> tuple[Task, Strategy]:
        """What the training loop is given for `task` and the prepared `strategy`, by a method that acts in every
        step."""
        ...


class Weights(Protocol):
    """The values that parameters start from, by the model's own parameter names."""

    def read(self, name: str, start: int, stop: int) -> Tensor:
        """Elements `start` to `stop` of the flattened parameter, 1-D, on the CPU, in the dtype stored."""
        ...

    def dtype(self, name: str) -> torch.dtype:
        """What the parameter is to be stored in: the method's dtype if it is trained, else what the model computes
        in."""
        ...

    def buffers(self, name: str) -> dict[str, Tensor]:
        """The values of module `name`'s meta buffers, by their names in it. All ranks ask, after they have read what
        they keep of its parameters."""
        ...


class MakeOptimizer(Protocol):
    """Builds the optimizer over trained parameters, after sharding."""

    @property
    def elementwise(self) -> bool:
        """Whether an element's update depends on that element alone, so that any part of a parameter can be updated
        by itself. Otherwise only whole parameters are given."""
        ...

    def __call__(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> torch.optim.Optimizer:
        """An optimizer whose groups have an `lr_scale`: what the learning rate is multiplied by. One with `eval` and
        `train` methods wants the former before the weights are used for anything but training."""
        ...


class Strategy(Protocol):
    """How model, gradients and optimizer are spread over the ranks.

    For each micro-batch of a step the loss is computed within `forward` and given to `backward`; then come `grad_norm`
    and `step`.
    The loss given to `backward` is this rank's part of the step's loss: gradients are summed over ranks.
    """

    model: nn.Module
    """What the forward pass is called on."""
    in_step: bool
    """Whether forward passes need all ranks, because parameters are gathered for them; it may change within
    `evaluating`."""
    evaluates: str
    """How parameters were gathered in `evaluating`, for people; empty where every rank has them all."""

    def prepare(self, model: nn.Module, weights: Weights, make_optimizer: MakeOptimizer | None) -> None:
        """Places a meta-device model, fills it and, unless None is given, builds its optimizer."""
        ...

    def forward(self, last: bool) -> AbstractContextManager[None]:
        """Surrounds the computation of one micro-batch's loss; `last`: of this step."""
        ...

    def backward(self, loss: Tensor) -> None:
        """Adds the gradients of this rank's part of the loss."""
        ...

    def grad_norm(self) -> float:
        """The 2-norm of the step's gradient over all parameters and ranks, its squares summed in float64."""
        ...

    def step(self, lr: float, scale: float) -> None:
        """Multiplies the gradients by `scale`, updates the parameters with learning rate `lr`, clears the gradients."""
        ...

    def evaluating(self) -> AbstractContextManager[nn.Module]:
        """The model in eval mode without gradients, for `loss_sum` and for `generate`."""
        ...

    def full_trained(self) -> Iterator[tuple[str, Tensor | None]]:
        """Each trained parameter whole, float32, on the CPU of rank 0 (None elsewhere). All ranks iterate; at
        most one parameter is whole at a time."""
        ...

    def shards(self) -> Iterator[Shard]:
        """This rank's part of each trained parameter that it has one of."""
        ...

    def overwrite(self, name: str, value: Tensor) -> None:
        """Sets a trained parameter: its master weight and what the forward pass reads. All ranks give the same whole
        value, in float32."""
        ...

    def pieces(self) -> Iterator[Piece]:
        """This rank's part of the trained parameters (of master weights, where there are any) and of all that the
        optimizer keeps of them, as they are between two steps. All ranks call it."""
        ...

    def restore(self, saved: Saved) -> None:
        """Takes what the optimizer keeps, after `prepare` with the parameters of the same checkpoint; saved by any
        strategy on any number of ranks. All ranks call it."""
        ...

    def drop(self) -> None:
        """Lets go of the model, which is of no use afterwards."""
        ...


class Batching(Protocol):
    """How the examples of one optimizer step are laid out for the ranks."""

    packed: bool
    """Whether a micro-batch is one row of all its examples, instead of a row for each."""

    def layout(self, lengths: NDArray[np.int64], ranks: int, budget: Budget) -> list[list[NDArray[np.int64]]]:
        """Positions in the step for each micro-batch: layout[rank][micro-batch], every rank with as many.

        `lengths` is [n, 2]: source and target length of the step's examples. A micro-batch may be empty.
        """
        ...
