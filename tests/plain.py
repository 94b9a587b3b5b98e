"""Fine-tuning as a plain torch loop over whole steps, to compare with. Knows transformers and torch, not shardtune."""

from __future__ import annotations

import json
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

import torch
import transformers
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from torch import Tensor, nn

import tiny

Row = dict[str, str]

SOURCE_LIMIT, TARGET_LIMIT = 20, 4
"""In tokens; below the longest text and the longest summary of `tiny.rows`."""
AUTO = {
    "seq2seq": transformers.AutoModelForSeq2SeqLM,
    "causal": transformers.AutoModelForCausalLM,
    "classification": transformers.AutoModelForSequenceClassification,
}
SEQ2SEQ, ENCODERS = ("t5", "mt5", "bart"), ("bert", "distilbert")
TASKS = {**dict.fromkeys(SEQ2SEQ, "seq2seq"), **dict.fromkeys(ENCODERS, "classification")}


def task_of(model_type: str) -> str:
    return TASKS.get(model_type, "causal")


class Step(NamedTuple):
    loss: float
    grad_norm: float
    lr: float
    tokens: int
    targets: int
    slots: int


def make_model(
    folder: Path, architecture: dict[str, Any], seed: int, dtype: torch.dtype = torch.float32, vocabulary: int = 41
) -> Path:
    """A model with weights and a tokenizer of whole words, saved as transformers saves it.

    No weight is left at a trivial value, and the vocabulary is odd, so that two ranks do not get as much of it.
    """
    task = task_of(architecture["model_type"])
    special = ["<pad>", "</s>", "<s>", "<unk>"]
    ids = {piece: index for index, piece in enumerate([*special, *tiny.WORDS])}
    settings = {**architecture, "vocab_size": vocabulary, "pad_token_id": 0, "eos_token_id": 1, "bos_token_id": 2}
    if task == "seq2seq":
        settings |= {"decoder_start_token_id": 0, "forced_eos_token_id": None}
    if task == "classification":
        settings |= {"num_labels": 2, "id2label": {0: "no", 1: "pet"}, "label2id": {"no": 0, "pet": 1}}
    torch.manual_seed(seed)
    config = transformers.AutoConfig.for_model(settings.pop("model_type"), **settings)
    model = AUTO[task].from_config(config, dtype=torch.float32)
    if architecture.get("tie_word_embeddings") is False and model.lm_head.weight is model.get_input_embeddings().weight:
        # T5's config always says tied; published models are untied by what their files hold.
        model.lm_head.weight = nn.Parameter(model.lm_head.weight.detach().clone())
        del model.all_tied_weights_keys["lm_head.weight"]
    with torch.no_grad():
        for parameter in model.parameters():
            parameter += torch.randn_like(parameter) * 0.1
    model.to(dtype).save_pretrained(str(folder))

    words = Tokenizer(models.WordLevel(ids, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    template = {"seq2seq": "$A </s>", "causal": "<s> $A", "classification": "<s> $A </s>"}[task]
    words.post_processor = processors.TemplateProcessing(single=template, special_tokens=[("<s>", 2), ("</s>", 1)])
    transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="</s>", bos_token="<s>", unk_token="<unk>"
    ).save_pretrained(str(folder))
    return folder


def load_tokenizer(folder: Path) -> Any:
    return transformers.AutoTokenizer.from_pretrained(folder)


def read_rows(path: Path) -> list[Row]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


def batch_of(tokenizer: Any, task: str, rows: Sequence[Row]) -> dict[str, Tensor]:
    """Arguments of the model's forward, labels included, padded to the longest row."""
    sources = [tokenizer(row["text"], truncation=True, max_length=SOURCE_LIMIT)["input_ids"] for row in rows]
    if task == "classification":
        batch = tokenizer.pad({"input_ids": sources}, return_tensors="pt")
        return {**batch, "labels": torch.tensor([["no", "pet"].index(row["label"]) for row in rows])}
    if task == "seq2seq":
        targets = [tokenizer(row["summary"], truncation=True, max_length=TARGET_LIMIT)["input_ids"] for row in rows]
        batch = tokenizer.pad({"input_ids": sources}, return_tensors="pt")
        return {**batch, "labels": _labels(targets)}
    limit = {"truncation": True, "max_length": TARGET_LIMIT - 1, "add_special_tokens": False}
    targets = [[*tokenizer(row["summary"], **limit)["input_ids"], tokenizer.eos_token_id] for row in rows]
    joined = [source + target for source, target in zip(sources, targets, strict=True)]
    batch = tokenizer.pad({"input_ids": joined}, return_tensors="pt", padding_side="right")
    return {**batch, "labels": _labels([[-100] * len(s) + t for s, t in zip(sources, targets, strict=True)])}


def _labels(rows: list[list[int]]) -> Tensor:
    return nn.utils.rnn.pad_sequence([torch.tensor(row) for row in rows], batch_first=True, padding_value=-100)


def sizes(task: str, batch: dict[str, Tensor]) -> tuple[int, int, int]:
    """Tokens that are no padding, targets, and slots."""
    tokens, slots = int(batch["attention_mask"].sum()), batch["input_ids"].numel()
    targets = int((batch["labels"] != -100).sum())
    if task == "seq2seq":
        return tokens + targets, targets, slots + batch["labels"].numel()
    return tokens, targets, slots


def train(
    model: nn.Module,
    task: str,
    batches: Sequence[dict[str, Tensor]],
    peak: float,
    weight_decay: float,
    eps: float,
    warmup: int,
    max_grad_norm: float | None,
) -> list[Step]:
    """One batch is one step: the model's own mean loss, AdamW, and a linear schedule."""
    model.train()
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    plain = [p for name, p in trained.items() if p.dim() < 2 or name.endswith("bias")]
    decayed = [p for name, p in trained.items() if not (p.dim() < 2 or name.endswith("bias"))]
    optimizer = torch.optim.AdamW(
        [{"params": decayed, "weight_decay": weight_decay}, {"params": plain, "weight_decay": 0.0}], lr=peak, eps=eps
    )
    scheduler = transformers.get_linear_schedule_with_warmup(optimizer, warmup, len(batches))
    steps = []
    for batch in batches:
        loss = model(**batch).loss
        loss.backward()
        gradients = [parameter.grad for parameter in trained.values() if parameter.grad is not None]
        norm = math.sqrt(sum(float(gradient.double().pow(2).sum()) for gradient in gradients))
        if max_grad_norm is not None and norm > max_grad_norm:
            for gradient in gradients:
                gradient *= max_grad_norm / (norm + 1e-6)
        steps.append(Step(loss.item(), norm, optimizer.param_groups[0]["lr"], *sizes(task, batch)))
        optimizer.step()
        scheduler.step()
        optimizer.zero_grad()
    return steps


def evaluation_loss(model: nn.Module, task: str, batch: dict[str, Tensor]) -> float:
    model.eval()
    with torch.no_grad():
        return model(**batch).loss.item()


def predict(model: Any, tokenizer: Any, task: str, row: Row, **more: Tensor) -> str:
    """What the model makes of one row, greedily and in at most six tokens; `more` of what it is called with."""
    model.eval()
    source = tokenizer(row["text"], truncation=True, max_length=SOURCE_LIMIT, return_tensors="pt")
    source = {"input_ids": source["input_ids"], "attention_mask": source["attention_mask"], **more}
    with torch.no_grad():
        if task == "classification":
            return ["no", "pet"][int(model(**source).logits.argmax())]
        written = model.generate(**source, max_new_tokens=6, do_sample=False)[0]
    new = written[source["input_ids"].shape[1] :] if task == "causal" else written
    return tokenizer.decode(new, skip_special_tokens=True).strip()
