"""What tuning is compared with: the base model, with examples in its prompt too, leads and majorities."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

import plain
import run_many
import tiny
from chats import make_tokenizer
from layouts import ARCHITECTURES
from shardtune.assemble.contenders import lead, sentences, without_adapter
from shardtune.assemble.data import read_texts
from shardtune.assemble.shots import _drawn, _earlier_turns, _learned_at_the_end, _tried
from shardtune.config_file import load_config
from shardtune.conversations import Conversation, from_text, to_text
from shardtune.examples import Encoded, Text
from shardtune.task.causal import Causal
from shardtune.task.chat import Chat
from shardtune.task.chat_template import set_template

SEED = 73
JUDGED = 7
BASELINE = {"examples": JUDGED, "max_new_tokens": 6, "baseline": True}
RUNS: dict[str, tuple[str, dict[str, Any]]] = {
    "few-shot": ("llama", {}),
    "prompt-tuned": ("llama", {"tuning": {"method": "prompt", "virtual_tokens": 3}}),
    "labels": ("bert", {"evaluation": BASELINE}),
    "numbers": ("bert", {"evaluation": BASELINE, "task__label": "number", "task__problem": "regression"}),
    "prompt-tuned-zero3": ("llama", {"tuning": {"method": "prompt", "virtual_tokens": 3}, "strategy__kind": "zero3"}),
}


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("contenders")
    for name in ("llama", "bert"):
        plain.make_model(folder / name, ARCHITECTURES[name], SEED)
    rows: Any = [row | {"number": number / 8} for number, row in enumerate(tiny.rows(30, SEED))]
    data = {"data__train": str(tiny.write_rows(folder / "shown.jsonl", rows))}
    data["data__validation"] = str(tiny.write_rows(folder / "judged.jsonl", rows[:1] + rows[20:]))
    configs = []
    for name, (model, options) in RUNS.items():
        given = {"duration__steps": 0, "evaluation": {**BASELINE, "shots": [0, 2]}, **data, **options}
        configs.append(run_many.config(folder, name, folder / model, plain.task_of(model), **given))
    run_many.train(folder, configs[:-1], 1)
    run_many.train(folder, configs[-1:], 2)
    return folder


def judged(done: Path, name: str) -> dict[str | None, dict[str, Any]]:
    """The evaluations' lines, by what they are of."""
    return {line.get("of"): line for line in run_many.metrics(done / "runs" / name)[1]}


def predictions(done: Path, name: str, of: str) -> list[dict[str, str]]:
    return plain.read_rows(done / "runs" / name / "predictions" / f"{of}-validation.jsonl")


def test_a_prompt_only_run_judges_all(done: Path) -> None:
    assert list(judged(done, "few-shot")) == [None, "shots-2", "lead"]
    assert list(judged(done, "prompt-tuned")) == [None, "base", "shots-2", "lead"]
    assert list(judged(done, "prompt-tuned-zero3")) == [None, "base", "shots-2", "lead"]
    assert list(judged(done, "labels")) == [None, "majority"]
    assert list(judged(done, "numbers")) == [None, "majority"]
    assert all(len(predictions(done, "few-shot", of)) == JUDGED for of in ("step-0", "shots-2", "lead"))


@pytest.mark.parametrize("name", ["prompt-tuned", "prompt-tuned-zero3"])
def test_the_base_is_the_model_without_its_adapter(done: Path, name: str) -> None:
    """To the last bit that which a run without one begins with."""
    plainly, tuned = judged(done, "few-shot"), judged(done, name)
    assert tuned["base"]["loss"] == plainly[None]["loss"]
    assert tuned["shots-2"]["loss"] == plainly["shots-2"]["loss"]
    assert tuned[None]["loss"] != plainly[None]["loss"]
    for of, same in (("base", "step-0"), ("shots-2", "shots-2")):
        assert predictions(done, name, of) == predictions(done, "few-shot", same)


def test_shots_are_examples_before_the_source(done: Path) -> None:
    """As transformers continues the prompt, written by hand; the judged examples are not among those shown."""
    config = load_config(done / "configs" / "few-shot" / "config.yaml", [])
    tokenizer = plain.load_tokenizer(done / "llama")
    corpus, task = read_texts(config), Causal(tokenizer, plain.SOURCE_LIMIT, plain.TARGET_LIMIT, whole_text=False)
    shown = _drawn(corpus, task, 2, 0)
    assert _drawn(corpus, task, 3, 0)[:2] == shown
    assert _drawn(corpus, task, 2, 1) != shown
    sources = {text.source for text in corpus.judged["validation"]}
    everything = _drawn(corpus, task, 30, 0)
    assert everything
    assert not sources & {text.source for text in everything}
    assert all(len(text.source.split()) < plain.SOURCE_LIMIT for text in everything)

    model: Any = plain.AUTO["causal"].from_pretrained(done / "llama").eval()
    lines = predictions(done, "few-shot", "shots-2")
    losses, count = 0.0, 0
    for row, line in zip(plain.read_rows(done / "judged.jsonl"), lines, strict=False):
        assert line["source"] == row["text"]
        prompt = "".join(f"Input: {shot.source}\nOutput: {shot.target}\n\n" for shot in shown)
        ids = tokenizer(f"{prompt}Input: {row['text']}\nOutput:")["input_ids"]
        limit = {"truncation": True, "max_length": plain.TARGET_LIMIT - 1, "add_special_tokens": False}
        target = [*tokenizer(row["summary"], **limit)["input_ids"], tokenizer.eos_token_id]
        with torch.no_grad():
            new = model.generate(torch.tensor([ids]), max_new_tokens=6, do_sample=False)[0, len(ids) :]
            logits = model(torch.tensor([ids + target])).logits[0, len(ids) - 1 : -1]
        assert line["prediction"] == tokenizer.decode(new, skip_special_tokens=True).strip()
        losses += float(torch.nn.functional.cross_entropy(logits, torch.tensor(target), reduction="sum"))
        count += len(target)
    assert judged(done, "few-shot")["shots-2"]["loss"] == pytest.approx(losses / count, rel=1e-5)
    assert lines != predictions(done, "few-shot", "step-0")


def test_leads_and_majorities_need_no_model(done: Path) -> None:
    rows = plain.read_rows(done / "judged.jsonl")
    assert [line["prediction"] for line in predictions(done, "few-shot", "lead")] == [r["text"] for r in rows[:JUDGED]]
    labels = [row["label"] for row in plain.read_rows(done / "shown.jsonl")]
    most = max(sorted(set(labels)), key=labels.count)
    assert [line["prediction"] for line in predictions(done, "labels", "majority")] == [most] * JUDGED
    mean = sum(n / 8 for n in range(30)) / 30
    means = {line["prediction"] for line in predictions(done, "numbers", "majority")}
    assert [float(value) for value in means] == [pytest.approx(mean)]
    assert all("loss" not in judged(done, name)[of] for name, of in (("labels", "majority"), ("few-shot", "lead")))


@pytest.mark.parametrize(
    ("text", "wanted"),
    [
        ("", []),
        ("No end", ["No end"]),
        ("One. Two! Three?", ["One.", "Two!", "Three?"]),
        ('He said "go." Then 3.5 went', ['He said "go."', "Then 3.5 went"]),
        ("A title\nA text. End", ["A title", "A text.", "End"]),
        ("Wait... what?! Yes.", ["Wait...", "what?!", "Yes."]),
        ("好。不好！", ["好。", "不好！"]),
    ],
)
def test_sentences(text: str, wanted: list[str]) -> None:
    assert sentences(text) == wanted
    assert lead(text, 2) == " ".join(wanted[:2])


def test_turns_of_examples_stand_after_the_system_message() -> None:
    system, ask = {"role": "system", "content": "s"}, {"role": "user", "content": "q"}
    shot = Text("", *to_text(Conversation([{"role": "system", "content": "x"}, {"role": "user", "content": "a"},
                                           {"role": "assistant", "content": "b"}], [])))  # fmt: skip
    text = Text("", *to_text(Conversation([system, ask, {"role": "assistant", "content": "r"}], [])))
    found = _earlier_turns(text, [shot, shot])
    assert found.target == "r"
    turns = from_text(found.source, found.target).turns
    assert [turn["content"] for turn in turns] == ["s", "a", "b", "a", "b", "q", "r"]
    assert _learned_at_the_end(Encoded([1], [2, ~3, 4, 5], False, False), 2).target == [~2, ~3, 4, 5]


@pytest.mark.parametrize("side", ["right", "left"])
def test_a_conversation_keeps_its_last_turn_where_examples_are_too_many(side: str) -> None:
    tokenizer = make_tokenizer()
    set_template(tokenizer, "chatml")
    tokenizer.truncation_side = side
    turns = [{"role": "user", "content": "q"}, {"role": "assistant", "content": "r"}]
    text = Text("", *to_text(Conversation(turns, [])))
    prompted = _earlier_turns(text, [text, text])
    (whole,) = Chat(tokenizer, 1000).encode([prompted])
    length = len(whole.source) + len(whole.target)
    assert _tried(Chat(tokenizer, length), prompted, chat=True) == whole
    assert _tried(Chat(tokenizer, length - 1), prompted, chat=True) is None


@pytest.mark.parametrize("kind", ["lora", "prefix", "ia3"])
def test_an_adapter_is_away_for_a_while_only(kind: str) -> None:
    torch.manual_seed(SEED)
    config = AutoConfig.for_model(**ARCHITECTURES["llama"])
    base: Any = AutoModelForCausalLM.from_config(config).eval()
    ids = torch.tensor([[3, 4, 5]])
    wanted = base(ids).logits
    common: dict[str, Any] = {"task_type": "CAUSAL_LM"}
    settings = {
        "lora": peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"], **common),
        "prefix": peft.PrefixTuningConfig(num_virtual_tokens=2, **common),
        "ia3": peft.IA3Config(init_ia3_weights=False, target_modules=["q_proj"], feedforward_modules=[], **common),
    }[kind]
    model: Any = peft.get_peft_model(base, settings)
    next(p for p in model.parameters() if p.requires_grad).requires_grad_(False)  # as a method may have wanted it
    before = {name: parameter.requires_grad for name, parameter in model.named_parameters()}
    adapted = model(ids, use_cache=kind == "prefix").logits
    assert not torch.equal(adapted, wanted)
    with without_adapter(model) as found, torch.no_grad():
        bare: Any = found
        assert torch.equal(bare(input_ids=ids).logits, wanted)
        assert bare.generate(input_ids=ids, max_new_tokens=2, do_sample=False).shape == (1, 5)
    assert torch.equal(model(ids, use_cache=kind == "prefix").logits, adapted)
    assert {name: parameter.requires_grad for name, parameter in model.named_parameters()} == before
