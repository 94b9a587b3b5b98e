import math
import random
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils._python_dispatch import TorchDispatchMode

from shardtune.optim.adamw import AdamW
from shardtune.optim.recipe import parameter_groups
from shardtune.optim.schedule import clip_scale, learning_rate, learning_rate_by_time, warmup_steps
from shardtune.strategy import gradients
from shardtune.strategy.gradients import squared_norm


@pytest.fixture
def draw() -> random.Random:
    seed = random.SystemRandom().randrange(2**32)
    print(f"seed {seed}")
    torch.manual_seed(seed)
    return random.Random(seed)


# ------------------------------------------------------------------------------------- learning rate


def transformers_rates(schedule: str, peak: float, warmup: int, total: int) -> list[float]:
    """What each step of a transformers schedule uses, and what a step after the last would."""
    from transformers import optimization

    optimizer = torch.optim.SGD([nn.Parameter(torch.zeros(1))], lr=peak)
    scheduler = {
        "constant": lambda: optimization.get_constant_schedule_with_warmup(optimizer, warmup),
        "linear": lambda: optimization.get_linear_schedule_with_warmup(optimizer, warmup, total),
        "cosine": lambda: optimization.get_cosine_schedule_with_warmup(optimizer, warmup, total),
    }[schedule]()
    rates = []
    for _ in range(total + 1):
        rates.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        scheduler.step()
    return rates


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_are_those_of_transformers(draw: random.Random, schedule: str) -> None:
    from transformers import TrainingArguments

    for _ in range(40):
        total, peak = draw.randrange(1, 120), draw.uniform(1e-6, 1e-2)
        warmup = draw.choice([0.0, 0.03, 1.0, 7.0, draw.random(), draw.uniform(1, 20), draw.uniform(1, 150)])
        rising = TrainingArguments.get_warmup_steps(SimpleNamespace(warmup_steps=warmup), total)  # type: ignore
        if warmup < 1:  # theirs can be a warm-up and nothing else, with a single step at rate 0
            rising = min(rising, total - 1)
        assert warmup_steps(warmup, total) == rising
        got = [learning_rate(step, total, peak, schedule, warmup) for step in range(total + 1)]
        assert got == transformers_rates(schedule, peak, rising, total), f"{total=} {peak=} {warmup=}"


def test_learning_rate_at_the_landmarks() -> None:
    rates = [learning_rate(step, 100, 2.0, "cosine", 0.1) for step in range(101)]
    assert rates[0] == 0.0
    assert rates[5] == 1.0
    assert rates[10] == 2.0
    assert rates[55] == pytest.approx(1.0)
    assert rates[100] == pytest.approx(0.0)
    assert learning_rate(75, 100, 2.0, "linear", 50) == 1.0
    assert learning_rate(0, 100, 2.0, "constant", 0.0) == 2.0
    with pytest.raises(ValueError, match="unknown schedule step"):
        learning_rate(0, 10, 1.0, "step", 0.0)


@pytest.mark.parametrize("schedule", ["constant", "linear", "cosine"])
def test_learning_rates_by_time_are_those_by_steps_that_take_as_long(draw: random.Random, schedule: str) -> None:
    """Where every step takes the same time, and the warm-up a whole number of steps or none."""
    for _ in range(40):
        total, peak, each = draw.randrange(2, 120), draw.uniform(1e-6, 1e-2), draw.uniform(1e-3, 1e2)
        rising = draw.randrange(total)
        for step in range(total):
            got = learning_rate_by_time(step, step * each, total * each, peak, schedule, rising / total)
            wanted = learning_rate(step, total, peak, schedule, rising if rising else 0.0)
            assert got == pytest.approx(wanted, rel=1e-9, abs=1e-12 * peak), f"{step=} {total=} {each=} {rising=}"


def test_learning_rate_by_time_at_the_landmarks() -> None:
    def rate(step: int, seconds: float, schedule: str, warmup: float) -> float:
        return learning_rate_by_time(step, seconds, 600.0, 2.0, schedule, warmup)

    assert rate(0, 0.0, "linear", 0.1) == 0.0
    assert rate(1, 30.0, "linear", 0.1) == 1.0
    assert rate(9, 60.0, "linear", 0.1) == 2.0
    assert rate(9, 330.0, "cosine", 0.1) == pytest.approx(1.0)
    assert rate(0, 0.0, "constant", 0.0) == 2.0
    assert [rate(step, 300.0, "linear", 4.7) for step in (0, 1, 2, 3, 4, 90)] == [0.0, 0.25, 0.5, 0.75, 1.0, 1.0]
    assert [rate(9, late, "linear", 0.1) for late in (600.0, 1e6)] == [0.0, 0.0]
    with pytest.raises(ValueError, match="unknown schedule step"):
        rate(0, 0.0, "step", 0.0)


# ---------------------------------------------------------------------------------------- parameters


class Tower(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.embed = nn.Embedding(7, 4)
        self.norm = nn.LayerNorm(4)
        self.linear = nn.Linear(4, 3)
        self.square_bias = nn.Parameter(torch.ones(3, 3))


def names_of(groups: list[dict], model: nn.Module) -> list[list[str]]:
    names = {id(parameter): name for name, parameter in model.named_parameters()}
    return [[names[id(parameter)] for parameter in group["params"]] for group in groups]


def test_biases_and_norms_are_not_decayed() -> None:
    model = Tower()
    groups = parameter_groups(model.named_parameters(), 0.1)
    assert names_of(groups, model) == [
        ["embed.weight", "linear.weight"],
        ["square_bias", "norm.weight", "norm.bias", "linear.bias"],
    ]
    assert [group["weight_decay"] for group in groups] == [0.1, 0.0]


def test_a_group_without_parameters_is_left_out() -> None:
    model = Tower()
    only_weights = [(n, p) for n, p in model.named_parameters() if n == "linear.weight"]
    only_biases = [(n, p) for n, p in model.named_parameters() if n == "linear.bias"]
    assert [group["weight_decay"] for group in parameter_groups(only_weights, 0.1)] == [0.1]
    assert [group["weight_decay"] for group in parameter_groups(only_biases, 0.1)] == [0.0]
    assert parameter_groups([], 0.1) == []


def test_zero3_parameters_are_grouped_by_their_own_shape() -> None:
    model = Tower()
    expected = names_of(parameter_groups(model.named_parameters(), 0.1), model)
    for parameter in model.parameters():
        parameter.ds_shape = parameter.shape  # type: ignore
        parameter.data = torch.empty(0)
    assert names_of(parameter_groups(model.named_parameters(), 0.1), model) == expected


def test_adamw_decays_only_what_it_should() -> None:
    model = Tower()
    before = {name: parameter.detach().clone() for name, parameter in model.named_parameters()}
    optimizer = AdamW(0.5, 0.1, betas=(0.8, 0.9), eps=1e-6)(model.named_parameters())
    assert optimizer.defaults["betas"] == (0.8, 0.9)
    assert optimizer.defaults["eps"] == 1e-6
    assert optimizer.defaults["fused"]
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter)
    optimizer.step()
    for name, parameter in model.named_parameters():
        factor = 1 - 0.5 * 0.1 if name in ("embed.weight", "linear.weight") else 1.0
        torch.testing.assert_close(parameter.detach(), before[name] * factor)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_adamw_on_a_gpu_is_fused_and_steps_as_on_the_cpu() -> None:
    results = []
    for device in ("cpu", "cuda"):
        torch.manual_seed(0)
        model = Tower().to(device)
        optimizer = AdamW(0.01, 0.1)(model.named_parameters())
        assert optimizer.defaults["fused"]
        for _ in range(3):
            output = model.linear(model.norm(model.embed(torch.arange(7, device=device))))
            (output @ model.square_bias).square().sum().backward()
            optimizer.step()
            optimizer.zero_grad()
        results.append([parameter.detach().cpu() for parameter in model.parameters()])
    torch.testing.assert_close(*results)


# ------------------------------------------------------------------------------------ norm, clipping


def random_tensors(draw: random.Random) -> list[torch.Tensor]:
    shapes = [(), (0,), (1,), (3, 0, 2), (draw.randrange(1, 999),), (300, draw.randrange(1, 2000)), (5, 6, 7)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    tensors = [torch.randn(s).mul(draw.choice([1e-6, 1, 1e3])).to(draw.choice(dtypes)) for s in shapes]
    return [*tensors, torch.randn(40, 30).t(), torch.randn(50, 20)[::3, 1::2], torch.full((10,), 3e38)]


def test_squared_norm_is_exact(draw: random.Random) -> None:
    for _ in range(5):
        tensors = random_tensors(draw)
        got = squared_norm(tensors)
        assert (got.dtype, got.shape, got.requires_grad) == (torch.float64, (), False)
        exact = math.fsum(x * x for tensor in tensors for x in tensor.double().flatten().tolist())
        assert float(got) == pytest.approx(exact, rel=1e-14)


def test_squared_norm_of_many_elements_as_numpys() -> None:
    # Long enough for many chunks; a float32 sum is off by 1e-3 here.
    tensor = torch.randn(10_000_019, generator=torch.Generator().manual_seed(0)).requires_grad_()
    exact = np.square(tensor.detach().numpy(), dtype=np.float64).sum()
    assert float(squared_norm([tensor])) == pytest.approx(float(exact), rel=1e-13)


def test_squared_norm_of_nothing_and_of_what_is_not_finite() -> None:
    assert float(squared_norm([])) == 0.0
    assert float(squared_norm(iter([torch.zeros(3)]))) == 0.0
    assert math.isnan(float(squared_norm([torch.tensor([1.0, math.nan])])))
    assert math.isinf(float(squared_norm([torch.tensor([1.0, -math.inf])])))


def test_squared_norm_copies_no_large_tensor() -> None:
    class Largest(TorchDispatchMode):
        elements = 0

        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            result = func(*args, **(kwargs or {}))
            if isinstance(result, torch.Tensor) and result.dtype == torch.float64:
                self.elements = max(self.elements, result.numel())
            return result

    with Largest() as largest:
        squared_norm([torch.ones(4 * gradients.CHUNK + 1), torch.ones(2 * gradients.CHUNK + 1, dtype=torch.bfloat16)])
    assert largest.elements == gradients.CHUNK


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU here")
def test_squared_norm_on_a_gpu(draw: random.Random) -> None:
    tensors = [*random_tensors(draw), torch.randn(2 * gradients.DEVICE_CHUNK + 3)]
    got = squared_norm([tensor.cuda() for tensor in tensors])
    assert got.device.type == "cuda"
    assert float(got) == pytest.approx(float(squared_norm(tensors)), rel=1e-13)


def test_clipping_is_torchs(draw: random.Random) -> None:
    for _ in range(50):
        parameters = [nn.Parameter(torch.zeros(n, dtype=torch.float64)) for n in (3, 1, 40)]
        for parameter in parameters:
            parameter.grad = torch.randn_like(parameter) * 10 ** draw.uniform(-4, 4)
        grads = [parameter.grad.clone() for parameter in parameters if parameter.grad is not None]
        limit = 10 ** draw.uniform(-4, 4)
        norm = math.sqrt(float(squared_norm(grads)))
        expected_norm = torch.nn.utils.clip_grad_norm_(parameters, limit)
        assert norm == pytest.approx(float(expected_norm), rel=1e-14)
        for parameter, grad in zip(parameters, grads, strict=True):
            torch.testing.assert_close(parameter.grad, grad * clip_scale(norm, limit), rtol=1e-13, atol=0.0)


def test_clip_scale_at_the_edges() -> None:
    assert clip_scale(123.0, None) == 1.0
    assert clip_scale(0.0, 1.0) == 1.0
    assert clip_scale(0.5, 1.0) == 1.0
    assert clip_scale(4.0, 1.0) == 1.0 / (4.0 + 1e-6)
    assert clip_scale(math.inf, 1.0) == 0.0
    assert math.isnan(clip_scale(math.nan, 1.0))
