"""Conversations drawn from a seed, a tokenizer that merges across borders, and templates as published models have."""

from __future__ import annotations

import random
import re
from collections.abc import Sequence
from functools import cache
from typing import Any

from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

Turn = dict[str, Any]

SPECIAL = [
    "<pad>", "</s>", "<s>", "<|im_start|>", "<|im_end|>", "<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>",
    "<start_of_turn>", "<end_of_turn>",
]  # fmt: skip
PIECES = [
    "red cat", "the old dog", "Ünïcödé", "漢字", "🙂", "a\nb", "x  y", "user", "assistant", "<think>", "{'k': [1]}",
    "\n\n", " ", "[INST]", "[/INST]", "<|im_start|>assistant\n", "<|im_end|>", "</s>", "model\n", "<end_of_turn>",
    "assistant\n\nHello", "<|assistant|>", ": ", "\t", "</think>\n\n", "{{ x }}", "{% generation %}",
]  # fmt: skip

LLAMA = """{{- bos_token }}{%- for m in messages %}
{{- '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\\n\\n' }}
{%- if m.role == 'assistant' %}{% generation %}
{%- if m.tool_calls %}{{- '{"name": "' + m.tool_calls[0].function.name + '", "parameters": ' }}
{{- m.tool_calls[0].function.arguments | tojson + '}<|eot_id|>' }}
{%- else %}{{- m.content | trim + '<|eot_id|>' }}{% endif %}
{%- endgeneration %}{% else %}{{- m.content | trim + '<|eot_id|>' }}{% endif %}
{%- endfor %}{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"""

# Thoughts of earlier questions are taken out; the last reply begins with an empty one if it has none.
QWEN = """{%- set ns = namespace(last=0) %}
{%- for m in messages %}{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}
{%- for m in messages %}{%- set content = m.content or '' %}
{%- if m.role == 'assistant' %}{%- set thought = '' %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].split('<think>')[-1].strip('\\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\\n') %}{%- endif %}
{{- '<|im_start|>assistant\\n' }}{%- generation %}
{%- if loop.index0 > ns.last and (loop.last or thought) %}
{{- '<think>\\n' + thought + '\\n</think>\\n\\n' }}{%- endif %}
{{- content }}{%- for call in m.tool_calls or [] %}{{- '\\n<tool_call>\\n' + call | tojson + '\\n</tool_call>' }}
{%- endfor %}{{- '<|im_end|>' }}{%- endgeneration %}{{- '\\n' }}
{%- else %}{{- '<|im_start|>' + m.role + '\\n' + content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}"""

# The system message stands in the last question, so that earlier questions change when another follows.
MISTRAL = """{%- set ns = namespace(system='', last=0) %}{%- for m in messages %}
{%- if m.role == 'system' %}{%- set ns.system = m.content + '\\n\\n' %}{%- endif %}
{%- if m.role == 'user' %}{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}{{- bos_token }}
{%- for m in messages %}{%- if m.role == 'user' %}
{{- '[INST] ' + (ns.system if loop.index0 == ns.last else '') + m.content + '[/INST]' }}
{%- elif m.role == 'assistant' %}{%- generation %}{{- ' ' + m.content + eos_token }}{%- endgeneration %}
{%- endif %}{%- endfor %}"""

GEMMA = """{{- bos_token }}{%- if messages[0].role == 'system' %}{%- set first = messages[0].content + '\\n\\n' %}
{%- set rest = messages[1:] %}{%- else %}{%- set first = '' %}{%- set rest = messages %}{%- endif %}
{%- for m in rest %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/assistant/...') }}{%- endif %}
{{- '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\\n' + (first if loop.first else '') }}
{%- if m.role == 'assistant' %}{%- generation %}{{- m.content | trim + '<end_of_turn>' }}{%- endgeneration %}
{%- else %}{{- m.content | trim + '<end_of_turn>' }}{%- endif %}{{- '\\n' }}{%- endfor %}
{%- if add_generation_prompt %}{{- '<start_of_turn>model\\n' }}{%- endif %}"""

ZEPHYR = """{%- for m in messages %}{{- '<|' + m.role + '|>\\n' }}{%- if m.role == 'assistant' %}
{%- generation %}{{- m.content + eos_token }}{%- endgeneration %}{%- else %}{{- m.content + eos_token }}{%- endif %}
{{- '\\n' }}{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

# One more token ends the conversation.
PHI = """{%- for m in messages %}{{- '<|' + m.role + '|>\\n' }}{%- if m.role == 'assistant' %}
{%- generation %}{{- m.content + '<|im_end|>' }}
{%- if loop.last and not add_generation_prompt %}{{- '\\n' + eos_token }}{%- endif %}{%- endgeneration %}
{%- if not loop.last or add_generation_prompt %}{{- '\\n' }}{%- endif %}
{%- else %}{{- m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|assistant|>\\n' }}{%- endif %}"""

# A thought is asked for, and only the last reply has one.
THINKING = """{%- for m in messages %}{{- '<|im_start|>' + m.role + '\\n' }}{%- if m.role == 'assistant' %}
{%- set content = m.content.split('</think>')[-1].lstrip('\\n') %}
{%- if loop.last %}{{- '<think>\\n' }}{%- endif %}
{%- generation %}{{- ('\\n</think>\\n\\n' if loop.last else '') + content + '<|im_end|>' }}{%- endgeneration %}
{{- '\\n' }}
{%- else %}{{- m.content + '<|im_end|>\\n' }}{%- endif %}{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n<think>\\n' }}{%- endif %}"""

TEMPLATES = {
    "llama": LLAMA, "qwen": QWEN, "mistral": MISTRAL, "gemma": GEMMA, "zephyr": ZEPHYR, "phi": PHI,
    "thinking": THINKING,
}  # fmt: skip
WITH_TOOLS = {"llama", "qwen", "chatml", "llama3", "plain"}


def untagged(template: str) -> str:
    """The same template, which does not say where the assistant's turns are."""
    return re.sub(r"\{%(-?)\s*(end)?generation\s*(-?)%\}", r"{%\1 if true \3%}{%- endif %}", template)


@cache
def _backend(special: tuple[str, ...], pieces: int) -> str:
    """A byte-level BPE without a pre-tokenizer that splits, so that pieces run over every border but special tokens."""
    rng = random.Random(0)
    tokenizer = Tokenizer(models.BPE(unk_token=None))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)  # pyright: ignore
    tokenizer.decoder = decoders.ByteLevel()  # pyright: ignore
    trainer = trainers.BpeTrainer(
        vocab_size=pieces, special_tokens=list(special), initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )  # pyright: ignore  # fmt: skip
    joined = ["".join(rng.choices(PIECES, k=12)) + "[/INST] " + rng.choice(PIECES) for _ in range(300)]
    tokenizer.train_from_iterator(joined, trainer)
    return tokenizer.to_str()


def make_tokenizer(template: str | None = None, special: Sequence[str] = SPECIAL, merges: bool = True) -> Any:
    """End token </s>; all of `special` are special tokens, and without `merges` the others are single bytes."""
    backend = Tokenizer.from_str(_backend(tuple(special), 700 if merges else len(special) + 256))
    made = PreTrainedTokenizerFast(tokenizer_object=backend, pad_token="<pad>", eos_token="</s>", bos_token="<s>")
    made.chat_template = template
    return made


def text(rng: random.Random, most: int = 5) -> str:
    """Not empty, often with whitespace at its ends and with what looks like markup."""
    made = "".join(rng.choices(PIECES, k=rng.randint(1, most)))
    return made if made.strip() else made + "x"


def conversation(rng: random.Random, exchanges: int = 4, tools: bool = False, system: float = 0.5) -> list[Turn]:
    """Turns that end with the assistant's; with `tools`, some exchanges have a call and its result."""
    turns: list[Turn] = [{"role": "system", "content": text(rng)}] if rng.random() < system else []
    for number in range(rng.randint(1, exchanges)):
        turns.append({"role": "user", "content": text(rng)})
        if tools and rng.random() < 0.4:
            function = {"name": f"tool_{number}", "arguments": {"place": text(rng), "n": number}}
            turns.append({"role": "assistant", "tool_calls": [{"type": "function", "function": function}]})
            if rng.random() < 0.5:
                turns[-1]["content"] = text(rng)
            turns.append({"role": "tool", "content": text(rng)})
        reply = text(rng)
        turns.append(
            {"role": "assistant", "content": reply if rng.random() < 0.7 else f"<think>\nhm\n</think>\n\n{reply}"}
        )
    return turns


def reference(tokenizer: Any, turns: list[Turn], tools: list[Any] | None = None) -> list[int]:
    """What transformers says: the ids up to the last of the assistant's, and `~id` where a token is not its own."""
    found = tokenizer.apply_chat_template(
        turns, tools=tools, return_dict=True, return_assistant_tokens_mask=True, tokenize=True
    )
    marked = [
        token if mine else ~token for token, mine in zip(found["input_ids"], found["assistant_masks"], strict=True)
    ]
    while marked[-1] < 0:
        marked.pop()
    return marked
