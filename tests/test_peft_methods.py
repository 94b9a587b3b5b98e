"""ia3, vera, loha, lokr, oft and ln_tuning: what they match, what they begin as, and that PEFT loads what they become.

The runs happen before the first test that needs them, in two process groups. SHARDTUNE_TEST_SEED repeats a failure.
"""

from __future__ import annotations

import os
import random
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from torch import nn

from peft_runs import Run, Runs, threads_of_one
from shardtune.errors import ConfigError
from shardtune.model.skeleton import Skeleton
from shardtune.strategy.parameters import materialize
from shardtune.tuning.ia3 import Ia3
from shardtune.tuning.ln_tuning import LnTuning, normalization_layers
from shardtune.tuning.loha import Loha
from shardtune.tuning.lokr import Lokr
from shardtune.tuning.oft import Oft
from shardtune.tuning.peft_adapter import PeftAdapter
from shardtune.tuning.vera import Vera
from shardtune.world import World
from skeletons import CLASSES, MODELS, TASKS, architecture, filled, logits, saved, skeleton_of

pytestmark = [
    pytest.mark.timeout(900),
    # PEFT does not know the classes of normalization layers, and wraps them all the same.
    pytest.mark.filterwarnings("ignore:Unsupported layer type:UserWarning"),
]

ALONE = World(0, 1, 0, torch.device("cpu"))
METHODS: dict[str, Callable[[str], PeftAdapter]] = {
    "ia3": lambda task: Ia3(task, None, None),
    "vera": lambda task: Vera(task, 16, 0.0, "all-linear"),
    "loha": lambda task: Loha(task, 8, 8, 0.0, "all-linear"),
    "lokr": lambda task: Lokr(task, 2, 8, None, 0.0, "all-linear"),
    "oft": lambda task: Oft(task, 32, 0.0, "all-linear"),
    "ln_tuning": lambda task: LnTuning(task),
}
CONFIGS: dict[str, Callable[[], Any]] = {
    "ia3": lambda: peft.IA3Config(),
    "vera": lambda: peft.VeraConfig(r=16, target_modules="all-linear"),
    "loha": lambda: peft.LoHaConfig(target_modules="all-linear"),
    "lokr": lambda: peft.LoKrConfig(r=2, target_modules="all-linear"),
    "oft": lambda: peft.OFTConfig(oft_block_size=32, target_modules="all-linear"),
}
NEEDS_LINEAR = ("loha", "lokr", "oft")


def applied(skeleton: Skeleton, method: PeftAdapter, seed: int = 0) -> Any:
    """The model with its adapter, all values in place."""
    with skeleton.recorder:
        model = method.apply(skeleton.model)
    assert all(parameter.is_meta for parameter in model.parameters())
    weights = method.initial(model, skeleton.weights(model, seed, torch.float32), ALONE)
    materialize(model, weights, torch.device("cpu"))
    return model


def skeleton(folder: Path, name: str, **changes: Any) -> Skeleton:
    return skeleton_of(architecture(folder, name, **changes), TASKS[name], pretrained=False)


@pytest.mark.parametrize("method", METHODS)
@pytest.mark.parametrize("name", ["t5-untied", "bart", "llama", "gpt2", "bert", "distilbert"])
def test_begins_as_the_model_itself(tmp_path: Path, name: str, method: str) -> None:
    folder, task = saved(tmp_path, name), TASKS[name]
    if name == "gpt2" and method in NEEDS_LINEAR:
        with pytest.raises(ConfigError, match=f"tuning.method: {method} does not exist for a gpt2 model.*Conv1D"):
            applied(skeleton_of(folder, task), METHODS[method](task))
        return
    base = logits(filled(skeleton_of(folder, task)))
    model = applied(skeleton_of(folder, task), METHODS[method](task))
    assert torch.equal(logits(model), base)
    torch.manual_seed(0)
    adapter = [p for n, p in model.named_parameters() if p.requires_grad and ".modules_to_save." not in n]
    with torch.no_grad():
        for parameter in adapter:
            parameter += 0.1 * torch.randn_like(parameter)
    assert not torch.allclose(logits(model), base)
    heads = {n.partition(".modules_to_save.")[0].rpartition(".")[2] for n, p in model.named_parameters()
             if p.requires_grad and ".modules_to_save." in n}  # fmt: skip
    assert heads == {"bert": {"classifier"}, "distilbert": {"classifier", "pre_classifier"}}.get(name, set())


@pytest.mark.parametrize("method", CONFIGS)
@pytest.mark.parametrize("name", ["t5", "bart", "llama"])
def test_has_the_parameters_that_peft_would_add(tmp_path: Path, name: str, method: str) -> None:
    folder = saved(tmp_path, name)
    config = CONFIGS[method]()
    config.task_type = {"seq2seq": "SEQ_2_SEQ_LM", "causal": "CAUSAL_LM"}[TASKS[name]]
    theirs: Any = peft.get_peft_model(CLASSES[TASKS[name]].from_pretrained(folder), config)
    ours = applied(skeleton_of(folder, TASKS[name]), METHODS[method](TASKS[name]))
    shapes = [{n: p.shape for n, p in model.named_parameters() if p.requires_grad} for model in (ours, theirs)]
    assert shapes[0] == shapes[1]
    # Where PEFT draws no values (zeros, ones), ours are the same; where it does, they have the same spread.
    for parameter, value in theirs.named_parameters():
        if value.requires_grad:
            mine = ours.get_parameter(parameter)
            if value.std() == 0:
                assert torch.equal(mine, value), parameter
            elif value.numel() >= 64:
                assert mine.std().item() == pytest.approx(value.std().item(), rel=0.5), parameter
    buffers = dict(theirs.named_buffers())
    assert {n for n, _ in ours.named_buffers()} == set(buffers)
    for buffer, value in ours.named_buffers():
        assert torch.equal(value, buffers[buffer]), buffer


@pytest.mark.parametrize("method", ["loha", "lokr"])
def test_seeds_draw_other_values(tmp_path: Path, method: str) -> None:
    drawn = []
    for seed in (0, 0, 1):
        model = applied(skeleton(tmp_path, "llama"), METHODS[method]("causal"), seed)
        drawn.append(torch.cat([p.flatten() for p in model.parameters() if p.requires_grad]))
    assert torch.equal(drawn[0], drawn[1])
    assert not torch.equal(drawn[0], drawn[2])


# --------------------------------------------------------------------------------------------------- ia3


@pytest.mark.parametrize(
    ("name", "outputs", "inputs"),
    [
        ("t5", {"k", "v"}, {"wo"}), ("t5-untied", {"k", "v"}, {"wo"}), ("bart", {"q_proj", "v_proj"}, {"fc2"}),
        ("llama", {"k_proj", "v_proj"}, {"down_proj"}), ("gpt2", {"c_attn"}, {"c_proj"}),
        ("distilbert", {"k_lin", "v_lin"}, {"lin2"}),  # not in PEFT's table
    ],
)  # fmt: skip
def test_ia3_defaults(tmp_path: Path, name: str, outputs: set[str], inputs: set[str]) -> None:
    model: Any = Ia3(TASKS[name], None, None).apply(skeleton(tmp_path, name).model)
    found: dict[bool, set[str]] = {True: set(), False: set()}
    for module_name, module in model.named_modules():
        if hasattr(module, "ia3_l"):
            found[module.is_feedforward].add(module_name.rpartition(".")[2])
            shape = module.ia3_l["default"].shape
            assert shape == ((1, module.in_features) if module.is_feedforward else (module.out_features, 1))
    assert found == {True: inputs, False: outputs}


@pytest.mark.parametrize(
    ("targets", "feedforward", "inputs"),
    [
        (["k_proj", "up_proj", "down_proj"], None, {"down_proj"}),
        (["k_proj", "up_proj", "down_proj"], ["up_proj"], {"up_proj"}),
        ("all-linear", r".*\.(gate|up)_proj", {"gate_proj", "up_proj"}),
        (None, ["v_proj"], {"v_proj"}),
        ("attention", None, set()),
    ],
)
def test_ia3_options(tmp_path: Path, targets: Any, feedforward: Any, inputs: set[str]) -> None:
    method = Ia3("causal", targets, feedforward)
    model: Any = method.apply(skeleton(tmp_path, "llama").model)
    layers = {n: m for n, m in model.named_modules() if hasattr(m, "ia3_l")}
    assert {n.rpartition(".")[2] for n, m in layers.items() if m.is_feedforward} == inputs
    assert method.notes()[0].startswith(f"on {len(layers)} linear layers: 2 ")


@pytest.mark.parametrize(
    ("targets", "feedforward", "message"),
    [
        (["q"], None, r"tuning.targets: \['q'\] matches no linear layer; there are down_proj"),
        (None, ["up_proj"], r"tuning.feedforward: \['up_proj'\] matches none of the target layers, which are d"),
        (None, "(", r"tuning.feedforward: '\(' is no regular expression"),
    ],
)  # fmt: skip
def test_ia3_refusals(tmp_path: Path, targets: Any, feedforward: Any, message: str) -> None:
    with pytest.raises(ConfigError, match=message):
        Ia3("causal", targets, feedforward).apply(skeleton(tmp_path, "llama").model)


# --------------------------------------------------------------------------------------------------- oft


@pytest.mark.parametrize(("given", "wide", "size"), [(32, 64, 32), (32, 80, 16), (12, 64, 8), (64, 96, 32)])
def test_oft_block_size(tmp_path: Path, given: int, wide: int, size: int) -> None:
    method = Oft("causal", given, 0.0, "all-linear")
    model: Any = method.apply(skeleton(tmp_path, "llama", intermediate_size=wide).model)
    rotations = [module.oft_R["default"] for module in model.modules() if hasattr(module, "oft_R")]
    assert len(rotations) == 14
    assert {rotation.block_size for rotation in rotations} == {size} == {model.peft_config["default"].oft_block_size}
    noted = [note for note in method.notes() if note.startswith(f"rotations of size {size}, not {given}")]
    assert len(noted) == (size != given)


def test_oft_finds_no_block_size(tmp_path: Path) -> None:
    with pytest.raises(ConfigError, match=r"tuning.block_size: no size from 2 to 32 divides .* have 32, 65 elements"):
        METHODS["oft"]("causal").apply(skeleton(tmp_path, "llama", intermediate_size=65).model)


# --------------------------------------------------------------------------------------------- ln_tuning


@pytest.mark.parametrize("name", MODELS)
def test_normalization_layers(tmp_path: Path, name: str) -> None:
    """All parameters of one dimension but for biases of linear layers are theirs."""
    model = skeleton(tmp_path, name).model
    linear = {f"{n}.bias" for n, m in model.named_modules() if isinstance(m, nn.Linear) or type(m).__name__ == "Conv1D"}
    flat = {n for n, p in model.named_parameters() if p.dim() == 1} - linear
    found = {f"{n}.{p}" for n, m in normalization_layers(model).items() for p, _ in m.named_parameters()}
    assert found == flat
    assert found
    method = LnTuning(TASKS[name])
    wrapped: Any = method.apply(model)
    trained = {n for n, p in wrapped.named_parameters() if p.requires_grad and ".modules_to_save." not in n}
    assert len(trained) == len(flat)
    assert all(".ln_tuning_layers.default." in n for n in trained)


def test_no_normalization_layers(tmp_path: Path) -> None:
    """OLMo's have no weights."""
    folder = architecture(tmp_path, "llama", model_type="olmo", architectures=["OlmoForCausalLM"])
    model = skeleton_of(folder, "causal", pretrained=False).model
    with pytest.raises(ConfigError, match=r"tuning\.method: ln_tuning does not exist for OlmoForCausalLM"):
        LnTuning("causal").apply(model)


# -------------------------------------------------------------------------------------------------- runs

SINGLE = [Run(method, model, "single") for method in METHODS for model in ("t5", "llama", "bert")]
SHARDED = [
    *(Run(method, "t5", "fsdp2") for method in METHODS),
    *(Run(method, "llama", "zero3") for method in METHODS),
    *(Run(method, "llama", "ddp") for method in ("vera", "oft")),  # which have buffers
]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Runs]:
    seed = int(os.environ.get("SHARDTUNE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    threads = threads_of_one()
    made = Runs(tmp_path_factory.mktemp("peft"), seed)
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = [p["run"] for p in parameters if isinstance(p.get("run"), Run)]
    alike = [run._replace(strategy="single") for run in selected]
    made.train([run for run in [*SINGLE, *SHARDED] if run in {*selected, *alike}])
    yield made
    torch.set_num_threads(threads)


@pytest.mark.parametrize("run", SINGLE, ids=lambda run: run.name)
def test_learns_and_loads(runs: Runs, run: Run) -> None:
    runs.assert_learned(run)
    runs.assert_loads(run)


@pytest.mark.parametrize("run", SHARDED, ids=lambda run: run.name)
def test_ranks_train_the_same_adapter(runs: Runs, run: Run) -> None:
    runs.assert_same_adapter(run, run._replace(strategy="single"), 1e-5)
    runs.assert_loads(run)
