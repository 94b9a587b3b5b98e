"""Virtual tokens in front of the text, so that what comes out lines up with what went in.

PEFT's own forward gives outputs for more positions than there are labels, drops `decoder_input_ids` of several tasks,
lets a decoder's classifier read the padding, and generates with padding between the virtual tokens and the text, which
moves them apart. Row by row, without padding, what is computed here is what PEFT computes.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers.modeling_outputs import SequenceClassifierOutput

if TYPE_CHECKING:  # takes seconds to import
    from peft import PeftModel


def put_in_front(model: PeftModel) -> None:
    """Changes `forward` and `generate` of a model whose virtual tokens are embeddings; others stay as they are.

    Both take what the base model's take, input_ids [b, s] and attention_mask [b, s] among it, and `task_ids` [b] where
    tasks have prompts of their own.
    """
    from peft import PeftType

    config = model.active_peft_config
    if config.peft_type not in (PeftType.PROMPT_TUNING, PeftType.P_TUNING, PeftType.MULTITASK_PROMPT_TUNING):
        return
    forwards = {
        "CAUSAL_LM": _continue, "SEQ_2_SEQ_LM": _translate, "SEQ_CLS": _classify, "TOKEN_CLS": _mark,
        "QUESTION_ANS": _mark,
    }  # fmt: skip
    model.forward = partial(forwards[str(config.task_type)], model)
    if config.task_type == "CAUSAL_LM":
        model.generate = partial(_generate, model)


def _with_prompt(
    model: Any, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Embeddings [b, n + s, d] and their mask [b, n + s]; padding on the left stays on the left."""
    words = model.word_embeddings(input_ids)
    count = model.active_peft_config.num_virtual_tokens
    if task_ids is not None:
        task_ids = task_ids.to(input_ids.device)
    prompt = model.get_prompt(len(input_ids), task_ids=task_ids)[:, :count].to(words.dtype)
    embeddings = torch.cat([prompt, words], dim=1)
    mask = torch.cat([attention_mask.new_ones(len(input_ids), count), attention_mask], dim=1)
    padding = attention_mask.argmax(dim=1)  # before the text
    if bool(padding.any()):
        places = torch.arange(mask.shape[1], device=mask.device).expand_as(mask)
        start, stop = padding[:, None], padding[:, None] + count
        # The virtual tokens move behind the padding, which takes their place.
        source = torch.where(places < start, places + count, torch.where(places < stop, places - start, places))
        embeddings = embeddings.gather(1, source[..., None].expand_as(embeddings))
        mask = mask.gather(1, source)
    return embeddings, mask


def _continue(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    task_ids: Tensor | None = None,
    logits_to_keep: Tensor | None = None,
    **inputs: Any,
) -> Any:
    """Logits of the positions of `input_ids` [b, s, v], or of those of them in `logits_to_keep`."""
    embeddings, mask = _with_prompt(model, input_ids, attention_mask, task_ids)
    count = mask.shape[1] - input_ids.shape[1]
    if logits_to_keep is not None:
        return model.base_model(
            inputs_embeds=embeddings, attention_mask=mask, logits_to_keep=logits_to_keep + count, **inputs
        )
    output = model.base_model(inputs_embeds=embeddings, attention_mask=mask, **inputs)
    output.logits = output.logits[:, count:]
    return output


def _translate(
    model: Any, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor | None = None, **inputs: Any
) -> Any:
    """As the base model's; only the encoder reads virtual tokens."""
    embeddings, mask = _with_prompt(model, input_ids, attention_mask, task_ids)
    return model.base_model(inputs_embeds=embeddings, attention_mask=mask, **inputs)


def _classify(model: Any, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor | None = None) -> Any:
    """Logits [b, c]; a decoder's are those at the last token of each text, which is padded on the right."""
    embeddings, mask = _with_prompt(model, input_ids, attention_mask, task_ids)
    base = model.base_model
    if not reads_last_token(base):
        return base(inputs_embeds=embeddings, attention_mask=mask)
    hidden = base.base_model(inputs_embeds=embeddings, attention_mask=mask, use_cache=False).last_hidden_state
    last = mask.sum(dim=1) - 1
    logits = base.score(hidden[torch.arange(len(last), device=last.device), last])
    return SequenceClassifierOutput(logits=logits)


def _mark(
    model: Any,
    input_ids: Tensor,
    attention_mask: Tensor,
    task_ids: Tensor | None = None,
    token_type_ids: Tensor | None = None,
) -> Any:
    """Outputs at the positions of `input_ids` [b, s] alone."""
    embeddings, mask = _with_prompt(model, input_ids, attention_mask, task_ids)
    count, inputs = mask.shape[1] - input_ids.shape[1], {}
    if token_type_ids is not None:
        inputs["token_type_ids"] = torch.nn.functional.pad(token_type_ids, (count, 0))
    output = model.base_model(inputs_embeds=embeddings, attention_mask=mask, **inputs)
    for name in ("logits", "start_logits", "end_logits"):
        if name in output:
            output[name] = output[name][:, count:]
    return output


def reads_last_token(base: Any) -> bool:
    """Whether a classifier's head reads the last token, as those of decoders do in transformers."""
    return hasattr(base, "score")


def _generate(
    model: Any, input_ids: Tensor, attention_mask: Tensor, task_ids: Tensor | None = None, **settings: Any
) -> Tensor:
    """The texts with what was written after them [b, s + t]."""
    embeddings, mask = _with_prompt(model, input_ids, attention_mask, task_ids)
    # The model reads the embeddings; the ids are for settings that look at what stands there, such as penalties.
    return model.base_model.generate(input_ids=input_ids, inputs_embeds=embeddings, attention_mask=mask, **settings)
