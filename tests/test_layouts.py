"""The same run on any layout: strategies, ranks, micro-batches and batching decide only how a step is computed.

The runs of the tests selected happen before the first of them, in two process groups: one of one rank, one of two.
They are a sample of what SHARDTUNE_TEST_ALL runs. SHARDTUNE_TEST_SEED repeats a failure.
"""

from __future__ import annotations

import json
import os
import random
from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
import pytest
import torch
from peft import get_peft_model_state_dict
from safetensors.torch import load_file
from torch import Tensor

import plain
import tiny
from layouts import (
    CLIPPED,
    DRAWN,
    FROZEN,
    KEPT,
    LLAMA,
    LORA,
    LORA_T5,
    OTHERS,
    ROUNDED,
    RUNS,
    SHUFFLED,
    SINGLE,
    STEPS,
    T5,
    TRAINED,
    UNTRAINED_ADAPTERS,
    Done,
    Run,
    launch_all,
)

pytestmark = pytest.mark.timeout(1200)  # the runs count towards the first test


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory, request: pytest.FixtureRequest) -> Iterator[Done]:
    seed = int(os.environ.get("SHARDTUNE_TEST_SEED") or random.SystemRandom().randrange(2**31))
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # more only wait for each other on models this small
    made = Done(tmp_path_factory.mktemp("layouts"), seed)
    parameters = [item.callspec.params for item in request.session.items if hasattr(item, "callspec")]
    selected = {params["run"].name for params in parameters if isinstance(params.get("run"), Run)}
    selected |= {run.name for run in [*SINGLE.values(), *UNTRAINED_ADAPTERS]}  # the others are compared with them
    launch_all(made, [run for run in RUNS if run.name in selected])
    yield made
    torch.set_num_threads(threads)


def by_name(runs: list[Run]) -> pytest.MarkDecorator:
    return pytest.mark.parametrize("run", runs, ids=lambda run: run.name)


def farthest(got: Sequence[float], wanted: Sequence[float]) -> float:
    """The largest relative difference."""
    return max(abs(a - b) / abs(b) for a, b in zip(got, wanted, strict=True))


def assert_same_course(done: Done, run: Run, losses: Sequence[float], norms: Sequence[float], limit: float) -> None:
    steps, _ = done.metrics(run)
    assert [step["step"] for step in steps] == list(range(1, STEPS + 1))
    far = farthest([step["loss"] for step in steps], losses), farthest([step["grad_norm"] for step in steps], norms)
    assert max(far) <= limit, f"loss and gradient norm differ by {far}; seed {done.seed}"


def assert_same_tensors(done: Done, got: dict[str, Tensor], wanted: dict[str, Tensor], limit: float) -> None:
    """Names, dtypes and shapes, and the values to a relative norm, or bit for bit if `limit` is 0."""
    assert {n: (t.dtype, t.shape) for n, t in got.items()} == {n: (t.dtype, t.shape) for n, t in wanted.items()}
    far = {
        name: float((got[name].double() - wanted[name].double()).norm() / wanted[name].double().norm())
        for name in wanted
        if not torch.equal(got[name], wanted[name])
    }
    assert all(value <= limit for value in far.values()), f"{far}; seed {done.seed}"


# --------------------------------------------------------------------------------- losses and gradients


@by_name([run for run in TRAINED if run.group != "shuffled"])
def test_every_layout_trains_as_a_plain_loop_over_whole_steps(done: Done, run: Run) -> None:
    wanted, _ = done.plain_loop(run)
    assert_same_course(done, run, [step.loss for step in wanted], [step.grad_norm for step in wanted], 1e-5)
    assert farthest([1 + step["lr"] for step in done.metrics(run)[0]], [1 + step.lr for step in wanted]) < 1e-12


def test_the_plain_loops_reach_what_they_are_for(done: Done) -> None:
    t5, llama = done.plain_loop(T5[0])[0], done.plain_loop(LLAMA[0])[0]
    assert sum(step.grad_norm > CLIPPED for step in t5) > STEPS / 2, f"little to clip; seed {done.seed}"
    assert t5[-1].loss < 0.9 * t5[0].loss, f"seed {done.seed}"
    assert llama[-1].loss < 0.9 * llama[0].loss, f"seed {done.seed}"
    assert len({step.targets for step in t5}) > 1, f"seed {done.seed}"
    assert len({step.targets for step in llama}) > 1, f"seed {done.seed}"


@by_name(SHUFFLED)
def test_shuffling_does_not_depend_on_the_layout(done: Done, run: Run) -> None:
    wanted, _ = done.metrics(SINGLE["shuffled"])
    assert_same_course(done, run, [step["loss"] for step in wanted], [step["grad_norm"] for step in wanted], 1e-5)
    # Every epoch visits each example once, in an order of its own.
    in_order, _ = done.metrics(T5[0])
    steps, _ = done.metrics(run)
    ends = range(3, STEPS, 4)
    assert [steps[end]["target_tokens"] for end in ends] == [in_order[end]["target_tokens"] for end in ends]
    counted = np.diff([0, *(step["target_tokens"] for step in steps)]).reshape(-1, 4)
    assert len({tuple(epoch) for epoch in counted.tolist()}) > 1, f"seed {done.seed}"
    far = [abs(step["loss"] / other["loss"] - 1) for step, other in zip(steps, in_order, strict=True)]
    assert max(far) > 1e-3, f"{far}; seed {done.seed}"


@by_name([*T5, *LLAMA, *(run for run in OTHERS if run.model == "bert")])
def test_counts(done: Done, run: Run) -> None:
    """Tokens, targets and examples since the start, and each step's share of padding."""
    rows, tokenizer = done.rows(run), plain.load_tokenizer(done.model(run.model))
    wanted = []
    examples = tokens = targets = 0
    for step in range(STEPS):
        at = step % -(-len(rows) // 16) * 16
        taken = rows[at : at + 16]
        new_tokens, new_targets, _ = plain.sizes(run.task, plain.batch_of(tokenizer, run.task, taken))
        examples, tokens, targets = examples + len(taken), tokens + new_tokens, targets + new_targets
        runs = -(-len(taken) // (16 // run.accumulation)) * run.ranks
        slots = 0
        for part in np.array_split(np.arange(len(taken)), runs):
            # A rank without an example computes on the step's first one, which does not count.
            some = [taken[index] for index in part] or taken[:1]
            slots += plain.sizes(run.task, plain.batch_of(tokenizer, run.task, some))[2]
        if run.batching == "packed":
            alone = plain.sizes(run.task, plain.batch_of(tokenizer, run.task, taken[:1]))[0]
            slots = new_tokens + max(0, runs - len(taken)) * alone
        wanted.append((examples, tokens, targets, 1 - new_tokens / slots))
    steps, _ = done.metrics(run)
    counts = [tuple(step[key] for key in ("examples", "tokens", "target_tokens")) for step in steps]
    assert counts == [row[:3] for row in wanted], f"seed {done.seed}"
    got = [step["padding_share"] for step in steps]
    if run.batching != "grouped":
        assert got == pytest.approx([row[3] for row in wanted], abs=1e-12), f"seed {done.seed}"
    elif 1 < 16 // run.ranks // run.accumulation < 16:  # else there is nothing to group, or nothing to group by
        assert sum(got) < 0.9 * sum(row[3] for row in wanted), f"seed {done.seed}"


@by_name(ROUNDED)
def test_bfloat16_trains_nearly_as_float32(done: Done, run: Run) -> None:
    steps, judged = done.metrics(run)
    single, single_judged = done.metrics(SINGLE[run.group])
    exact, _ = done.plain_loop(SINGLE[run.model])
    losses = [step["loss"] for step in steps]
    assert losses[-1] < 0.9 * losses[0], f"{losses}; seed {done.seed}"
    assert farthest(losses, [step["loss"] for step in single]) < 0.05, f"seed {done.seed}"
    assert farthest(losses, [step.loss for step in exact]) < 0.05, f"seed {done.seed}"
    assert losses != [step.loss for step in exact]
    assert judged["loss"] == pytest.approx(single_judged["loss"], rel=0.05), f"seed {done.seed}"


# ------------------------------------------------------------------------------------------ evaluation


@by_name([run for run in [*T5, *LLAMA, *KEPT, *LORA, *OTHERS] if run.option("model__dtype", "") != "bfloat16"])
def test_evaluation_is_that_of_the_result_in_one_process(done: Done, run: Run) -> None:
    judged, single = (tiny.lasting(done.metrics(which)[1]) for which in (run, SINGLE[run.group]))
    for loss in ("loss", "train_loss"):
        assert judged.pop(loss, 1.0) == pytest.approx(single.pop(loss, 1.0), rel=1e-5), f"seed {done.seed}"
    assert judged == single, f"seed {done.seed}"
    assert done.predictions(run) == done.predictions(SINGLE[run.group]), f"seed {done.seed}"


@by_name([SINGLE[group] for group in ("t5", "llama", "kept", "lora", "bert")])
def test_evaluation_is_what_the_libraries_say_of_the_result(done: Done, run: Run) -> None:
    """Loaded by transformers or peft; each example alone, so without padding."""
    model, rows = done.load(run), done.judged()
    tokenizer = plain.load_tokenizer(done.path(run) / "final")
    loss = plain.evaluation_loss(model, run.task, plain.batch_of(tokenizer, run.task, rows))
    assert done.metrics(run)[1]["loss"] == pytest.approx(loss, rel=1e-5), f"seed {done.seed}"
    references = [row["label" if run.task == "classification" else "summary"] for row in rows]
    wanted = [
        {"source": row["text"], "reference": reference, "prediction": plain.predict(model, tokenizer, run.task, row)}
        for row, reference in zip(rows, references, strict=True)
    ]
    assert done.predictions(run) == wanted, f"seed {done.seed}"


def test_predictions_differ(done: Done) -> None:
    """Or a mixed-up order would go unnoticed."""
    assert len({row["prediction"] for row in done.predictions(SINGLE["kept"])}) > 1, f"seed {done.seed}"


# --------------------------------------------------------------------------------------------- results


@by_name(TRAINED)
def test_the_result_is_that_of_one_process(done: Done, run: Run) -> None:
    assert_same_tensors(done, done.final(run), done.final(SINGLE[run.group]), 1e-4)


@by_name([run for run in SINGLE.values() if run in TRAINED and run.group != "shuffled"])
def test_the_result_is_that_of_the_plain_loop(done: Done, run: Run) -> None:
    _, model = done.plain_loop(run)
    state = get_peft_model_state_dict(model) if run.makes_adapter else model.state_dict()
    got = done.final(run)
    assert_same_tensors(done, got, {name: state[name] for name in got}, 1e-4)


@by_name(LORA + LORA_T5)
def test_adapters_grow(done: Done, run: Run) -> None:
    grown = {name: tensor.abs().max() for name, tensor in done.final(run).items() if "lora_B" in name}
    assert grown
    assert all(value > 1e-4 for value in grown.values()), f"{grown}; seed {done.seed}"


@by_name(FROZEN)
def test_what_is_frozen_stays_bit_for_bit(done: Done, run: Run) -> None:
    begun, got = load_file(done.model("t5") / "model.safetensors"), done.final(run)
    frozen = ("shared.", "encoder.block.0.", "decoder.block.0.")
    assert {n for n in got if torch.equal(got[n], begun[n])} == {n for n in got if n.startswith(frozen)}


@by_name(KEPT)
def test_without_a_step_the_result_is_the_pretrained_file(done: Done, run: Run) -> None:
    begun = load_file(done.model(run.model) / "model.safetensors")
    assert ("lm_head.weight" in begun) == (run.model == "t5-loud")
    assert_same_tensors(done, done.final(run), begun, 0)


@by_name(DRAWN)
def test_drawn_weights_do_not_depend_on_the_layout(done: Done, run: Run) -> None:
    drawn = done.final(run)
    assert_same_tensors(done, drawn, done.final(SINGLE[run.group]), 0)
    begun = load_file(done.model(run.model) / "model.safetensors")
    assert not any(torch.equal(drawn[n], begun[n]) for n in drawn if n.endswith("wte.weight") or n == "shared.weight")


@by_name([run for run in [*TRAINED, *DRAWN, *KEPT] if run.accumulation == 2 and not run.makes_adapter])
def test_transformers_loads_the_result_and_would_write_the_same_names(done: Done, run: Run, tmp_path: Path) -> None:
    model = done.load(run)
    model.save_pretrained(str(tmp_path))
    assert_same_tensors(done, done.final(run), load_file(tmp_path / "model.safetensors"), 0)
    written, begun = (
        json.loads((f / "config.json").read_text()) for f in (done.path(run) / "final", done.model(run.model))
    )
    loss = {"problem_type": "single_label_classification"} if run.task == "classification" else {}
    assert written == {**begun, **loss, "dtype": "bfloat16" if run.model.endswith("-bf16") else "float32"}
    tokenizers = [plain.load_tokenizer(f) for f in (done.path(run) / "final", done.model(run.model))]
    rows = [row["text"] for row in done.rows(run)]
    assert tokenizers[0](rows)["input_ids"] == tokenizers[1](rows)["input_ids"]


@by_name(LORA + LORA_T5)
def test_peft_loads_the_result_and_would_write_the_same(done: Done, run: Run, tmp_path: Path) -> None:
    model = done.load(run)
    settings = model.peft_config["default"]
    assert {"method": "lora", "rank": settings.r, "alpha": settings.lora_alpha} == run.options["tuning"]
    model.save_pretrained(str(tmp_path))
    assert_same_tensors(done, done.final(run), load_file(tmp_path / "adapter_model.safetensors"), 0)
    assert {tensor.dtype for tensor in done.final(run).values()} == {torch.float32}
