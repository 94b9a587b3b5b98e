"""A spread sample of `make methods`: each method once, each strategy with several; and what does not exist is refused.

The runs of the tests selected happen before the first of them. SHARDTUNE_TEST_SEED repeats a failure.
"""

from __future__ import annotations

import os
import random
from collections.abc import Iterator

import pytest
import torch
from safetensors.torch import load_file, save_file

from method_runs import METHODS, MODELS, REFUSED, Case, Trial, Verdict, largest_difference

pytestmark = pytest.mark.timeout(1200)  # the runs count towards the first test

SHARDED = ("fsdp2", "zero3", "ddp")
ELSEWHERE = {"bitfit": "bart"}
SAMPLE = [
    Case(method, ELSEWHERE.get(method, MODELS[number // 3 % 2]), SHARDED[number % 3])
    for number, method in enumerate(METHODS)
]
REFUSALS = [Case(method, model, "single") for method, model in REFUSED]

Verdicts = dict[Case, Verdict]


@pytest.fixture(scope="module")
def trial(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Trial]:
    seed = int(os.environ.get("SHARDTUNE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other on models this small
    yield Trial(tmp_path_factory.mktemp("methods"), seed)
    torch.set_num_threads(threads)


@pytest.fixture(scope="module")
def verdicts(trial: Trial, request: pytest.FixtureRequest) -> Verdicts:
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    cases = [each["case"] for each in parameters if isinstance(each.get("case"), Case)]
    return {verdict.case: verdict for verdict in trial.judge(cases)}


@pytest.mark.parametrize("case", [*SAMPLE, *REFUSALS], ids=lambda case: case.name)
def test_method(case: Case, verdicts: Verdicts, trial: Trial) -> None:
    verdict = verdicts[case]
    assert verdict.problem is None, f"{verdict.problem}; seed {trial.seed}\n{trial.said(case)[-3000:]}"
    assert verdict.refused == (case in REFUSALS)


@pytest.mark.parametrize("case", [case for case in SAMPLE if case.method == "lora"], ids=lambda case: case.name)
def test_a_wrong_result_is_seen(case: Case, verdicts: Verdicts, trial: Trial) -> None:
    loss = verdicts[case].after
    assert loss is not None, f"seed {trial.seed}\n{trial.said(case)[-3000:]}"
    assert trial.reload(case, loss) == []
    file = trial.run(case) / "final" / "adapter_model.safetensors"
    tensors = load_file(file)
    save_file({name: tensor * 1.1 for name, tensor in tensors.items()}, file)
    problems = trial.reload(case, loss)
    save_file(tensors, file)
    assert problems
    assert problems[0].startswith("reloaded, its loss is"), problems


def test_the_sample_is_spread() -> None:
    assert {case.method for case in SAMPLE} == set(METHODS)
    for strategy in SHARDED:
        assert len({case.model for case in SAMPLE if case.strategy == strategy}) > 1


def test_differences_are_seen() -> None:
    one = {"a": torch.tensor([1.0, -4.0]), "b": torch.zeros(3)}
    assert largest_difference(one, one) == 0
    assert largest_difference({**one, "a": torch.tensor([1.0, -4.002])}, one) == pytest.approx(5e-4, rel=1e-3)
    assert largest_difference({**one, "a": torch.tensor([1.01, -4.0])}, one) == pytest.approx(2.5e-3, rel=1e-3)
    assert largest_difference({"a": one["a"]}, one) == float("inf")
    assert largest_difference({**one, "b": torch.full((3,), 1e-9)}, one) > 1
    assert largest_difference({**one, "b": torch.tensor([0.0, float("nan"), 0.0])}, one) > 1
