"""Conversations: which rows are, which tokens are learned, what is cut, and a run from file to answer."""

from __future__ import annotations

import json
import random
from collections import Counter
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch

from chats import SPECIAL, TEMPLATES, WITH_TOOLS, conversation, make_tokenizer, reference, text, untagged
from launching import command, run
from shardtune.cli import main
from shardtune.conversations import Conversation, from_text, to_text
from shardtune.data.fields import questions, texts
from shardtune.data.files import Row
from shardtune.data.messages import EMPTY_REPLY, NO_ASSISTANT
from shardtune.errors import ConfigError, DataError
from shardtune.examples import IGNORED, Encoded, Text, Tokens
from shardtune.protocols import Generation
from shardtune.row_fields import Fields
from shardtune.task import turns as turns_module
from shardtune.task.chat import GENERATION_TAG, Chat
from shardtune.task.chat_template import NAMES, set_template
from tiny import rows as tiny_rows
from tiny import tiny_config

ALL = [*TEMPLATES, *NAMES]
FIELDS = Fields(None, None, None, "messages", "tools")
TOOL = {"type": "function", "function": {"name": "tool_0", "description": "Ünïcödé", "parameters": {"type": "object"}}}
EVERYTHING = 10**6


def user(content: str) -> dict[str, Any]:
    return {"role": "user", "content": content}


def assistant(content: str) -> dict[str, Any]:
    return {"role": "assistant", "content": content}


def read(*messages: Any, tools: Any = None) -> list[Text]:
    return list(texts([Row("f:3", {"messages": list(messages), "tools": tools})], FIELDS, Counter()))


def tokenizer_with(name: str, tagged: bool = True, **options: Any) -> Any:
    made = make_tokenizer(TEMPLATES.get(name), **options)
    if name in NAMES:
        set_template(made, name)
    if not tagged:
        made.chat_template = untagged(made.chat_template)
        assert not GENERATION_TAG.search(made.chat_template)
    return made


def encode(chat: Chat, turns: list[Any], tools: Any = ()) -> Encoded:
    return chat.encode([Text("f:1", *to_text(Conversation(turns, list(tools))))])[0]


def joined(encoded: Encoded) -> list[int]:
    return [*(~token for token in encoded.source), *encoded.target]


def pieces(tokenizer: Any, encoded: Encoded) -> str:
    """The conversation as text, what is learned between ⟦ and ⟧."""
    shown, inside = "", False
    ids: list[int] = []
    for token in [*joined(encoded), ~0]:
        if (token >= 0) != inside:
            shown, ids, inside = shown + tokenizer.decode(ids) + ("⟧" if inside else "⟦"), [], not inside
        ids.append(token if token >= 0 else ~token)
    return shown + tokenizer.decode(ids[:-1])


# --------------------------------------------------------------------------------------------------- rows


def test_rows_become_the_last_turn_and_what_stands_before() -> None:
    turns = [{"role": "system", "content": "S"}, user("é"), assistant("one"), user("two"), assistant(" three\n")]
    (found,) = read(*turns, user("what follows the last answer"))
    assert found == Text("f:3", json.dumps({"messages": turns[:-1]}, ensure_ascii=False), " three\n")
    assert read(*turns) == [found]
    assert from_text(found.source, found.target) == Conversation(turns, [])
    as_json = Row("f:3", {"messages": json.dumps(turns), "tools": json.dumps([TOOL])})
    (with_tools,) = texts([as_json], FIELDS, Counter())
    assert with_tools == read(*turns, tools=[TOOL])[0]
    assert with_tools.source == json.dumps({"messages": turns[:-1], "tools": [TOOL]}, ensure_ascii=False)
    parts = [{"type": "text", "text": " th"}, {"type": "text", "text": "ree\n"}]
    assert read(*turns[:-1], {"role": "assistant", "content": parts, "tool_calls": None}) == [found]


def test_conversations_come_back_from_their_text() -> None:
    call = {
        "role": "assistant",
        "content": "",
        "tool_calls": [{"function": {"name": "f", "arguments": {"b": 1, "a": 2}}}],
    }
    tricky = assistant(json.dumps(assistant("a reply that is itself the JSON of a turn")))
    for last in [call, tricky, assistant("{}"), assistant('{"role": "user"}'), {**assistant("x"), "name": "n"}]:
        found = read(user("a"), last)[0]
        assert from_text(found.source, found.target).turns == [user("a"), last]
    for seed in range(50):
        turns = conversation(random.Random(seed), tools=True)
        assert from_text(*to_text(Conversation(turns, [TOOL]))) == Conversation(turns, [TOOL]), f"seed {seed}"


def test_sharegpt() -> None:
    call = {"name": "f", "arguments": {"x": 1}}
    given = [
        {"from": "system", "value": "S"}, {"from": "human", "value": "a"},
        {"from": "function_call", "value": json.dumps(call)}, {"from": "observation", "value": "1"},
        {"from": "gpt", "value": "b"},
    ]  # fmt: skip
    calling = {"role": "assistant", "tool_calls": [{"type": "function", "function": call}]}
    expected = [
        {"role": "system", "content": "S"}, user("a"), calling, {"role": "tool", "content": "1"}, assistant("b"),
    ]  # fmt: skip
    assert read(*given) == read(*expected)


def test_rows_without_a_reply_are_left_out_and_counted() -> None:
    given = [[], [user("a")], [user("a"), assistant(" \n")], [user("a"), assistant(""), user("b"), assistant("c")]]
    dropped: Counter[str] = Counter()
    rows = [Row("f:1", {"messages": turns, "tools": None}) for turns in given]
    assert not list(texts(rows, FIELDS, dropped))
    assert dropped == {NO_ASSISTANT: 2, EMPTY_REPLY: 2}


@pytest.mark.parametrize(
    ("messages", "said"),
    [
        (None, "f:7 field `messages`: null, not a list of messages"),
        ("hello", "f:7 field `messages`: a string that is not JSON of a list of messages"),
        ({"turns": []}, "an object, not a list of messages; a dot reaches inside, as in `messages.turns`"),
        (["hi"], 'f:7 field `messages`: turn 1: a string, not an object such as {"role": "user", "content": "…"}'),
        ([user("a"), {"role": "asistant", "content": "b"}], "turn 2: role 'asistant' is not one of system, developer, "
         "user, assistant, tool; did you mean assistant?"),
        ([{"role": "human", "content": "b"}], "role 'human' is not one of system, developer, user, assistant, tool; "
         "did you mean user?"),
        ([{"role": 3, "content": "b"}], "turn 1: role 3 is not one of"),
        ([{"from": "humn", "value": "b"}], "from 'humn' is not one of system, human, user, gpt, assistant, "
         "function_call, observation, tool; did you mean human?"),
        ([{"rol": "user", "content": "b"}], "no role; the turn has: rol, content; did you mean role instead of rol?"),
        ([{"role": "user"}], "turn 1: no content; the turn has: role"),
        ([{"role": "user", "content": None}], "turn 1: no content"),
        ([{"role": "user", "contents": "b"}], "did you mean content instead of contents?"),
        ([{"role": "user", "content": 3}], "turn 1: the content is a number, not a string or a list of text parts"),
        ([{"role": "user", "content": [{"type": "image"}]}], "turn 1: part 1 of the content is of type 'image'"),
        ([user("a"), {"role": "assistant", "tool_calls": [{"function": {}}]}], "turn 2: tool call 1 has no function"),
        ([user("a"), {"role": "assistant", "tool_calls": "x"}], "turn 2: tool_calls is a string, not a list"),
        ([{"role": "user", "content": "", "tool_calls": [{"name": "f"}]}], "only the assistant calls tools"),
        ([{"from": "function_call", "value": "no"}], "turn 1: a function_call whose value is not JSON"),
        ([user("a"), {**assistant("b"), "weight": 0}], "turn 2: weight 0; every turn of the assistant is learned"),
        ([user("\ud800"), assistant("b")], "not valid text: \\ud800 is half of a surrogate pair"),
        ([user("a"), {**assistant("b"), "n": b""}], "holds a value that JSON cannot hold"),
    ],
)  # fmt: skip
def test_faults_of_rows(messages: Any, said: str) -> None:
    with pytest.raises(DataError) as caught:
        list(texts([Row("f:7", {"messages": messages, "tools": None})], FIELDS, Counter()))
    assert said in str(caught.value)


def test_nulls_that_tables_put_in_are_left_out() -> None:
    """Every row of a table has the fields of all rows."""
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Rome", "date": None}}}
    turns = [user("a"), {"role": "assistant", "content": None, "tool_calls": [call], "weight": 1}]
    tools = [{"name": "f", "strict": None, "parameters": {"city": {"type": "string", "enum": None}}}]
    (found,) = texts([Row("f:7", {"messages": turns, "tools": tools})], FIELDS, Counter())
    assert "null" not in found.source + found.target
    assert "weight" not in found.target
    assert "Rome" in found.target


def test_faults_of_fields() -> None:
    for row, said in [
        ({"mesages": []}, "field `messages`: absent; the row has: mesages; did you mean `mesages`?"),
        ({"messages": [user("a"), assistant("b")]}, "field `tools`: absent (null or [] is a row without tools)"),
        ({"messages": [user("a"), assistant("b")], "tools": ["f"]}, "`tools`: tool 1: a string, not an object"),
    ]:
        with pytest.raises(DataError) as caught:
            list(texts([Row("f:7", row)], FIELDS, Counter()))
        assert said in str(caught.value)


def test_questions() -> None:
    def asked(*turns: Any) -> list[Any]:
        (found,) = questions([Row("f:1", {"m": list(turns)})], "m", None)
        return from_text(found, "").turns

    assert asked(user("a")) == [user("a")]
    assert asked(user("a"), assistant("b"), assistant("c")) == [user("a")]
    assert asked(user("a"), assistant("b"), user("c")) == [user("a"), assistant("b"), user("c")]
    with pytest.raises(DataError, match="no turn is there to answer"):
        asked(assistant("a"))


# ------------------------------------------------------------------------------------------------- tokens


@pytest.mark.parametrize("tagged", [True, False], ids=["tagged", "untagged"])
@pytest.mark.parametrize("name", ALL)
def test_learned_are_the_tokens_that_transformers_names(name: str, tagged: bool) -> None:
    tokenizer, twin = tokenizer_with(name, tagged), tokenizer_with(name)
    chat = Chat(tokenizer, EVERYTHING)
    has_tools = name in WITH_TOOLS
    for seed in range(40):
        rng = random.Random(seed)
        turns = conversation(rng, tools=has_tools)
        tools = [TOOL] if has_tools and rng.random() < 0.5 else []
        found = encode(chat, turns, tools)
        assert joined(found) == reference(twin, turns, tools or None), f"seed {seed}"
        whole = tokenizer.apply_chat_template(turns, tools=tools or None, tokenize=True, return_dict=False)
        ids = [token if token >= 0 else ~token for token in joined(found)]
        assert ids == whole[: len(ids)], f"seed {seed}"
        assert not any((found.source_cut, found.target_cut))


@pytest.mark.parametrize("tagged", [True, False], ids=["tagged", "untagged"])
@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("llama", "<s><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant"
         "<|end_header_id|>\n\n⟦b<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n⟦d<|eot_id|>⟧"),
        ("qwen", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n<|im_start|>user\nc<|im_end|>\n"
         "<|im_start|>assistant\n⟦<think>\n\n</think>\n\nd<|im_end|>⟧"),
        ("mistral", "<s>[INST] a[/INST]⟦ b</s>⟧[INST] c[/INST]⟦ d</s>⟧"),
        ("gemma", "<s><start_of_turn>user\na<end_of_turn>\n<start_of_turn>model\n⟦b<end_of_turn>⟧\n"
         "<start_of_turn>user\nc<end_of_turn>\n<start_of_turn>model\n⟦d<end_of_turn>⟧"),
        ("zephyr", "<|user|>\na</s>\n<|assistant|>\n⟦b</s>⟧\n<|user|>\nc</s>\n<|assistant|>\n⟦d</s>⟧"),
        ("chatml", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
         "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n⟦d<|im_end|>⟧"),
        ("llama3", "<s><|start_header_id|>user<|end_header_id|>\n\na<|eot_id|><|start_header_id|>assistant"
         "<|end_header_id|>\n\n⟦b<|eot_id|>⟧<|start_header_id|>user<|end_header_id|>\n\nc<|eot_id|>"
         "<|start_header_id|>assistant<|end_header_id|>\n\n⟦d<|eot_id|>⟧"),
        ("phi", "<|user|>\na<|im_end|>\n<|assistant|>\n⟦b<|im_end|>⟧\n<|user|>\nc<|im_end|>\n<|assistant|>\n"
         "⟦d<|im_end|>\n</s>⟧"),
        ("thinking", "<|im_start|>user\na<|im_end|>\n<|im_start|>assistant\n⟦b<|im_end|>⟧\n"
         "<|im_start|>user\nc<|im_end|>\n<|im_start|>assistant\n<think>\n⟦\n</think>\n\nd<|im_end|>⟧"),
        ("plain", "<s>User: a\n\nAssistant:⟦ b</s>⟧\n\nUser: c\n\nAssistant:⟦ d</s>⟧"),
    ],
)  # fmt: skip
def test_what_is_learned_as_people_read_it(name: str, expected: str, tagged: bool) -> None:
    tokenizer = tokenizer_with(name, tagged, merges=False)
    found = encode(Chat(tokenizer, EVERYTHING), [user("a"), assistant("b"), user("c"), assistant("d")])
    assert pieces(tokenizer, found) == expected


def test_as_numbers() -> None:
    """ChatML of one exchange, token by token."""
    tokenizer = tokenizer_with("chatml", tagged=False, merges=False)
    start, end, newline = tokenizer.convert_tokens_to_ids(["<|im_start|>", "<|im_end|>", "Ċ"])
    words = [tokenizer(word)["input_ids"] for word in ("user\nq", "assistant\n", "r")]
    found = encode(Chat(tokenizer, EVERYTHING), [user("q"), assistant("r"), user("q"), assistant("r")])
    assert found.source == [start, *words[0], end, newline, start, *words[1]]
    asked = [newline, *found.source]
    assert found.target == [*words[2], end, *(~token for token in asked), *words[2], end]


def test_tool_results_are_not_learned() -> None:
    call = {"role": "assistant", "tool_calls": [{"type": "function", "function": {"name": "f", "arguments": {"x": 1}}}]}
    turns = [user("q"), call, {"role": "tool", "content": "42"}, assistant("It is 42.")]
    for tagged in (True, False):
        tokenizer = tokenizer_with("chatml", tagged, merges=False)
        assert pieces(tokenizer, encode(Chat(tokenizer, EVERYTHING), turns)) == (
            "<|im_start|>user\nq<|im_end|>\n<|im_start|>assistant\n"
            '⟦<tool_call>{"name": "f", "arguments": {"x": 1}}</tool_call><|im_end|>⟧\n'
            "<|im_start|>tool\n42<|im_end|>\n<|im_start|>assistant\n⟦It is 42.<|im_end|>⟧"
        )


def test_a_token_over_the_border_is_learned() -> None:
    """Without an end token the whitespace of the template is left out, and that of the reply is not."""
    template = (
        "{%- for m in messages %}{{- m.role + ': ' }}{%- if m.role == 'assistant' %}{% generation %}{{- m.content }}"
        "{% endgeneration %}{% else %}{{- m.content }}{% endif %}{{- '\\n' }}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'assistant: ' }}{% endif %}"
    )
    twin, tokenizer = make_tokenizer(template), make_tokenizer(untagged(template))
    chat = Chat(tokenizer, EVERYTHING)
    straddling = 0
    for seed in range(60):
        rng = random.Random(seed)
        # transformers marks only the first token of a last character that takes several.
        turns = [{**turn, "content": turn["content"].rstrip("🙂漢字é") + "x \n"} for turn in conversation(rng)]
        found = encode(chat, turns)
        assert joined(found) == reference(twin, turns), f"seed {seed}"
        straddling += not tokenizer.decode(found.source).endswith("assistant: ")
    assert straddling > 5, "pieces of this tokenizer run over borders"


def test_unclear_templates_are_refused() -> None:
    # What it asks for is not what it writes once the answer is there.
    asks_otherwise = TEMPLATES["zephyr"].replace("{{- '<|assistant|>\\n' }}", "{{- '<|assistant|>\\n<think>' }}")
    # What ends a turn depends on whether another one follows.
    ends = "m.content + ('</s>' if loop.last else '<s>') }}{%- endgen"
    ends_otherwise = TEMPLATES["zephyr"].replace("m.content + eos_token }}{%- endgen", ends)
    turns = [user("a"), assistant("b"), user("c"), assistant("d")]
    for template, said in [(asks_otherwise, "begins"), (ends_otherwise, "ends")]:
        assert template != TEMPLATES["zephyr"]
        assert joined(encode(Chat(make_tokenizer(template), EVERYTHING), turns))
        with pytest.raises(ConfigError, match=rf"does not show where the assistant's turn . {said}; .* chatml, llama3"):
            encode(Chat(make_tokenizer(untagged(template)), EVERYTHING), turns)


def test_earlier_turns_that_change_are_found(monkeypatch: pytest.MonkeyPatch) -> None:
    """The other tests would not notice if templates were never as hard as these."""
    asked = Counter[str]()
    original = turns_module._marked_start
    monkeypatch.setattr(turns_module, "_marked_start", lambda *a: asked.update(["marked"]) or original(*a))
    result = {"role": "tool", "content": "z"}
    thinking = [user("a"), assistant("<think>x</think>\n\ny"), result, assistant("b"), user("c"), assistant("d")]
    system = [{"role": "system", "content": "S"}, user("a"), assistant("b"), user("c"), assistant("d")]
    for name, turns in [("qwen", thinking), ("mistral", system)]:
        asked.clear()
        tokenizer = tokenizer_with(name, tagged=False)
        assert joined(encode(Chat(tokenizer, EVERYTHING), turns)) == reference(tokenizer_with(name), turns)
        assert asked["marked"] > 0, name


def test_conversations_that_a_template_refuses() -> None:
    chat = Chat(tokenizer_with("gemma"), EVERYTHING)
    with pytest.raises(
        DataError, match="f:1: the chat template cannot write this conversation: Conversation roles must"
    ):
        encode(chat, [user("a"), user("b"), assistant("c")])


# --------------------------------------------------------------------------------------------------- cuts


@pytest.mark.parametrize("tagged", [True, False], ids=["tagged", "untagged"])
@pytest.mark.parametrize("name", ALL)
def test_whole_turns_are_kept(name: str, tagged: bool) -> None:
    tokenizer, twin = tokenizer_with(name, tagged), tokenizer_with(name)
    squeezed = Counter[bool]()
    for seed in range(60):
        rng = random.Random(seed)
        turns = conversation(rng, 5, tools=name in WITH_TOOLS)
        limit = rng.choice([2, 3, 5, 20, 60, 120])
        tokenizer.truncation_side = side = rng.choice(["right", "left"])
        found = encode(Chat(tokenizer, limit), turns)
        where = f"seed {seed}, limit {limit}, {side}"
        length = len(found.source) + len(found.target)
        assert length <= limit, where
        assert found.source, where
        assert found.target[0] >= 0, where
        assert found.target[-1] >= 0, where
        full = reference(twin, turns)
        whole = len(full)
        assert (found.source_cut or found.target_cut) == (whole > limit), where
        if whole <= limit:
            assert joined(found) == full, where
            continue
        system = [turn for turn in turns[:1] if turn["role"] == "system"]
        if side == "right":
            shorter = [turns[: n + 1] for n, turn in enumerate(turns) if turn["role"] == "assistant"]
        else:
            shorter = [[*system, *turns[n:]] for n, turn in enumerate(turns) if turn["role"] == "user"][::-1]
        sizes = [len(reference(twin, some)) for some in shorter]
        count = next((n for n, size in enumerate(sizes) if size > limit), len(sizes))
        squeezed[count == 0] += 1
        if count:
            assert (found.source_cut, found.target_cut) == (side == "left", side == "right"), where
            assert joined(found) == reference(twin, shorter[count - 1]), where
        else:
            exchange = reference(twin, shorter[0])
            start = max([n for n, token in enumerate(exchange) if token < 0]) + 1
            prompt, reply = [token if token >= 0 else ~token for token in exchange[:start]], exchange[start:]
            kept = max(limit // 2, 1)
            assert list(found.target) == (reply if len(reply) <= kept else [*reply[: kept - 1], reply[-1]]), where
            room = limit - len(found.target)
            assert found.source_cut == (len(prompt) > room or (side == "left" and len(shorter) > 1)), where
            assert found.target_cut == (len(reply) > kept or (side == "right" and len(shorter) > 1)), where
            if len(prompt) > room > 1:
                assert list(found.source) == [prompt[0], *prompt[len(prompt) - room + 1 :]], where
            else:
                assert list(found.source) == prompt[-room:], where
    assert min(squeezed[True], squeezed[False]) > 3, "both ways were taken"


@pytest.mark.parametrize("side", ["right", "left"])
def test_the_reference_is_the_turn_that_is_predicted(side: str) -> None:
    tokenizer = tokenizer_with("chatml")
    tokenizer.truncation_side = side
    turns = [{"role": role, "content": f"{role} {n}"} for n in range(4) for role in ("user", "assistant")]
    example = Text("here", *to_text(Conversation(turns, [])))
    whole = len(joined(Chat(tokenizer, 10_000).encode([example])[0]))
    found = set()
    for limit in range(whole, 8, -4):
        chat = Chat(tokenizer, limit)
        target = np.array(chat.encode([example])[0].target)
        last = np.flatnonzero(target < 0)
        written = tokenizer.decode(target[last[-1] + 1 if len(last) else 0 :], skip_special_tokens=True).strip()
        (reference,) = chat.references(example)
        assert reference.startswith(written), limit  # of a single exchange the end may be cut
        found.add(reference)
    assert found == ({f"assistant {n}" for n in range(4)} if side == "right" else {"assistant 3"})


def test_questions_lose_their_oldest_turns() -> None:
    tokenizer = tokenizer_with("chatml")
    turns = [{"role": "system", "content": "S"}, user("a " * 30), assistant("b"), user("c"), assistant("d"), user("e")]

    def asked(limit: int) -> Encoded:
        return Chat(tokenizer, limit).encode([Text("f:1", *to_text(Conversation(turns, [])))])[0]

    def ids(*some: Any) -> list[int]:
        return tokenizer.apply_chat_template(list(some), add_generation_prompt=True, tokenize=True, return_dict=False)

    whole, shorter, last = ids(*turns), ids(turns[0], *turns[3:]), ids(turns[0], turns[5])
    assert asked(len(whole)) == Encoded(whole, [], False, False)
    assert asked(len(whole) - 1) == asked(len(shorter)) == Encoded(shorter, [], True, False)
    assert asked(len(shorter) - 1) == Encoded(last, [], True, False)
    assert asked(4) == Encoded([last[0], *last[-3:]], [], True, False)


# --------------------------------------------------------------------------------------- batches and models


def as_tokens(encoded: Encoded) -> Tokens:
    return Tokens(np.array(encoded.source, np.int32), np.array(encoded.target, np.int32))


def model_for(tokenizer: Any) -> Any:
    from transformers import LlamaConfig, LlamaForCausalLM, set_seed

    set_seed(1)
    config = LlamaConfig(
        vocab_size=len(tokenizer), hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2,
        num_key_value_heads=2, pad_token_id=0, eos_token_id=1, bos_token_id=2, initializer_range=0.5,
    )  # fmt: skip
    return LlamaForCausalLM(config).eval()


def test_batches_and_the_loss() -> None:
    tokenizer = tokenizer_with("chatml", tagged=False)
    chat = Chat(tokenizer, EVERYTHING)
    found = [encode(chat, conversation(random.Random(seed))) for seed in range(5)]
    batch = chat.collate([as_tokens(e) for e in found])
    learned = [token for e in found for token in e.target if token >= 0]
    assert batch.targets == len(learned)
    assert int(batch.inputs["input_ids"].min()) >= 0
    assert batch.labels[batch.labels != IGNORED].tolist() == learned
    in_place = torch.full_like(batch.inputs["input_ids"], IGNORED)
    in_place[:, batch.inputs["logits_to_keep"] + 1] = batch.labels
    for row, labels, e in zip(batch.inputs["input_ids"], in_place, found, strict=True):
        ids = [token if token >= 0 else ~token for token in joined(e)]
        assert row[: len(ids)].tolist() == ids
        assert labels[: len(ids)].tolist() == [IGNORED if token < 0 else token for token in joined(e)]
    model = model_for(tokenizer)
    with torch.no_grad():
        one_by_one = 0.0
        for e in found:
            ids = torch.tensor([[token if token >= 0 else ~token for token in joined(e)]])
            labels = torch.tensor([[token if token >= 0 else IGNORED for token in joined(e)]])
            count = int((labels != IGNORED).sum())
            one_by_one += float(model(input_ids=ids, labels=labels).loss) * count
        assert float(chat.loss_sum(model, batch)) == pytest.approx(one_by_one, rel=1e-5)


def test_prediction_answers_the_last_turn_and_stops_at_its_end() -> None:
    tokenizer = tokenizer_with("chatml", tagged=False)
    end = tokenizer.convert_tokens_to_ids("<|im_end|>")
    chat, model = Chat(tokenizer, EVERYTHING), model_for(tokenizer)
    examples = []
    for seed in range(4):
        turns = conversation(random.Random(seed))
        whole = encode(chat, turns)
        question = chat.encode([Text("f:1", to_text(Conversation(turns, []))[0], "")])[0]
        examples += [(as_tokens(whole), as_tokens(question))]
        ids = tokenizer.apply_chat_template(turns[:-1], add_generation_prompt=True, return_dict=False)
        assert question == Encoded(ids, [], False, False)
    how = Generation(6, 1, in_step=False)
    wholes, asked = zip(*examples, strict=True)
    with torch.no_grad():
        written = chat.predict(model, wholes, how)
        assert written == chat.predict(model, asked, how)
        assert any(written)
        model.lm_head.weight.copy_(torch.zeros_like(model.lm_head.weight))
        model.lm_head.weight[end] = 1.0  # one of the two signs of the hidden state likes it best
        model.lm_head.weight[5] = -1.0
        lengths = []
        original = model.generate
        model.generate = lambda **given: lengths.append((given, original(**given))) or lengths[-1][1]
        chat.predict(model, wholes, how)
    given, out = lengths[0]
    assert given["generation_config"].eos_token_id == [1, end]
    chat.stop_at_turns_end(model)
    assert model.generation_config.eos_token_id == [1, end]
    new = out[:, given["input_ids"].shape[1] :]
    for row in new.tolist():
        assert end not in row or set(row[row.index(end) + 1 :]) <= {0}, "nothing but padding follows"


# ---------------------------------------------------------------------------------------------- templates


def test_templates_by_name_and_file(tmp_path: Path) -> None:
    path = tmp_path / "mine.jinja"
    path.write_text(TEMPLATES["zephyr"], encoding="utf-8")
    tokenizer = make_tokenizer()
    with pytest.raises(ConfigError, match=r"has no chat template; name one: chatml, llama3, plain, or a path"):
        set_template(tokenizer, None)
    set_template(tokenizer, str(path))
    assert tokenizer.chat_template == TEMPLATES["zephyr"]
    set_template(tokenizer, None)
    assert tokenizer.chat_template == TEMPLATES["zephyr"]
    with pytest.raises(ConfigError, match=r"'chatlm' is not one of chatml, llama3, plain.*; did you mean chatml\?"):
        set_template(tokenizer, "chatlm")
    with pytest.raises(ConfigError, match=r"there is no such file; did you mean .*mine\.jinja\?"):
        set_template(tokenizer, str(tmp_path / "mime.jinja"))
    path.write_text("{% for m in messages %}\n{{ m.content }\n{% endfor %}", encoding="utf-8")
    with pytest.raises(ConfigError, match=r"mine\.jinja:2 task.template: not a valid Jinja template: "):
        set_template(tokenizer, str(path))
    tokenizer.chat_template = "{% if %}"
    with pytest.raises(ConfigError, match=r"the tokenizer's own chat template, line 1: not a valid Jinja template"):
        set_template(tokenizer, None)
    path.write_bytes(b"\xff")
    with pytest.raises(ConfigError, match="cannot be read as UTF-8"):
        set_template(tokenizer, str(path))


def test_a_tokenizer_with_several_templates() -> None:
    tokenizer = make_tokenizer()
    tokenizer.chat_template = {"default": TEMPLATES["zephyr"], "tool_use": TEMPLATES["qwen"]}
    chat = Chat(tokenizer, EVERYTHING)
    turns = [user("a"), assistant("b")]
    assert joined(encode(chat, turns)) == reference(make_tokenizer(TEMPLATES["zephyr"]), turns)
    assert joined(encode(chat, turns, [TOOL])) == reference(make_tokenizer(TEMPLATES["qwen"]), turns, [TOOL])
    tokenizer.chat_template = {"tool_use": TEMPLATES["qwen"]}
    with pytest.raises(ConfigError, match=r"task\.template: the tokenizer's own: "):
        Chat(tokenizer, EVERYTHING)


def test_turns_end_with_a_token_that_exists() -> None:
    few = SPECIAL[:3]
    for name in NAMES:
        for special, last in [(SPECIAL, {"chatml": "<|im_end|>", "llama3": "<|eot_id|>"}), (few, {})]:
            tokenizer = tokenizer_with(name, special=special)
            found = encode(Chat(tokenizer, EVERYTHING), [user("a"), assistant("b")])
            assert found.target[-1] == tokenizer.convert_tokens_to_ids(last.get(name, "</s>"))


def test_the_template_is_saved_with_the_tokenizer(tmp_path: Path) -> None:
    from transformers import AutoTokenizer

    tokenizer = tokenizer_with("llama3")
    tokenizer.save_pretrained(str(tmp_path))
    assert AutoTokenizer.from_pretrained(str(tmp_path)).chat_template == tokenizer.chat_template


# ------------------------------------------------------------------------------------------------- a run


def write_chats(path: Path, count: int, seed: int) -> Path:
    rng = random.Random(seed)
    lines = []
    for row in tiny_rows(count, seed):
        turns = [user(row["text"]), assistant(row["summary"])]
        if rng.random() < 0.5:
            turns += [user("and the label"), assistant(row["label"])]
        lines.append(json.dumps({"messages": turns}) + "\n")
    path.write_text("".join(lines), encoding="utf-8")
    return path


def test_a_run_from_file_to_answer(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    (tmp_path / "data").mkdir()
    train = write_chats(tmp_path / "data" / "train.jsonl", 40, 1)
    with train.open("a") as file:
        file.write(json.dumps({"messages": [user("a")]}) + "\n")
    validation = write_chats(tmp_path / "data" / "validation.jsonl", 6, 2)
    config = tiny_config(
        tmp_path, "llama", data={"train": str(train), "validation": str(validation)}, duration__steps=2,
        task={"kind": "causal", "messages": "messages", "template": "plain", "max_source_tokens": 96},
    )  # fmt: skip
    assert main(["train", "--config", str(config), "--ranks", "1"]) == 0, capsys.readouterr().err
    shown = "".join(capsys.readouterr())
    assert f"1 {NO_ASSISTANT}" in shown
    folder = tmp_path / "runs" / "tiny"
    last = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][-1]
    assert {"loss", "rougeL"} <= last.keys()
    assert "generation" in (folder / "final" / "chat_template.jinja").read_text()
    predicted = [
        json.loads(line) for line in (folder / "predictions" / "step-2-validation.jsonl").read_text().splitlines()
    ]
    given = [json.loads(line)["messages"] for line in validation.read_text().splitlines()][: len(predicted)]
    assert [p["reference"] for p in predicted] == [turns[-1]["content"] for turns in given]

    assert main(["generate", "--run", str(folder), "--input", str(validation)]) == 0
    written = [json.loads(line) for line in capsys.readouterr().out.splitlines()]
    assert written[: len(predicted)] == [{key: p[key] for key in ("source", "prediction")} for p in predicted]
    assert main(["generate", "--run", str(folder), "a red cat"]) == 0
    single = capsys.readouterr().out
    asked = tmp_path / "asked.jsonl"
    asked.write_text(json.dumps({"messages": [user("a red cat")]}) + "\n")
    assert main(["generate", "--run", str(folder), "--input", str(asked)]) == 0
    assert json.loads(capsys.readouterr().out)["prediction"] + "\n" == single
    assert main(["evaluate", "--config", str(config), "--split", "validation"]) == 0, capsys.readouterr().err


def test_faults_of_a_run(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    data = write_chats(tmp_path / "chats.jsonl", 5, 1)
    task = {"kind": "causal", "messages": "messages"}
    config = tiny_config(tmp_path / "run", "llama", task=task, data={"train": str(data)})
    done = run(command("python", 1, "--config", config), tmp_path / "cache")
    assert done.code == 2, done.said
    assert "has no chat template; name one: chatml, llama3, plain, or a path ending in .jinja" in done.err
    with data.open("a") as file:
        file.write(json.dumps({"messages": [{"role": "usr", "content": "a"}]}) + "\n")
    assert main(["train", "--config", str(config), "--ranks", "1"]) == 3
    said = capsys.readouterr().err
    assert f"{data}:6 field `messages`: turn 1: role 'usr' is not one of" in said
    assert "did you mean user?" in said


def test_tables_are_made_anew_for_another_template(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    template = tmp_path / "mine.jinja"
    losses = []
    data = write_chats(tmp_path / "chats.jsonl", 20, 1)
    for text_of in (TEMPLATES["zephyr"], TEMPLATES["mistral"]):
        template.write_text(text_of)
        config = tiny_config(
            tmp_path, "llama", task={"kind": "causal", "messages": "messages", "template": str(template)},
            data={"train": str(data)}, duration__steps=1, checkpoint={"resume": "never"},
        )  # fmt: skip
        assert main(["train", "--config", str(config), "--ranks", "1"]) == 0
        log = tmp_path / "runs" / "tiny" / "metrics.jsonl"
        losses.append(json.loads(log.read_text().splitlines()[0])["loss"])
    assert losses[0] != losses[1]


def test_text_helper_is_never_blank() -> None:
    assert all(text(random.Random(seed)).strip() for seed in range(200))
