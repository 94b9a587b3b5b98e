"""QLoRA as transformers, peft and bitsandbytes give it, or Unsloth, in a plain loop: the other side of gpu_qlora.py.

Takes one JSON object of settings, prints one of results.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

if '"library": "unsloth"' in sys.argv[1]:
    import unsloth  # before transformers, which it patches

import bitsandbytes as bnb
import torch
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer

DEVICE = torch.device("cuda" if torch.cuda.is_available() else "cpu")
IGNORED = -100


def quantized(path: str) -> Any:
    """A model with random weights whose linear layers are made, filled and quantized one after the other."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            four = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, torch.bfloat16, True, "nf4",
                device="meta",
            )  # fmt: skip
            values = torch.randn(module.weight.shape, dtype=torch.bfloat16, device=DEVICE) * 0.02
            four.weight = bnb.nn.Params4bit(values.cpu(), requires_grad=False, quant_type="nf4").to(DEVICE)
            outer, _, key = name.rpartition(".")
            setattr(model.get_submodule(outer), key, four)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                filled = torch.randn(parameter.shape, dtype=torch.bfloat16, device=DEVICE) * 0.02
                module._parameters[key] = nn.Parameter(filled if parameter.dim() > 1 else torch.ones_like(filled))
    rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rotary.to(DEVICE)
    model.is_loaded_in_4bit = True
    return model


def of_transformers(settings: dict[str, Any]) -> Any:
    model = prepare_model_for_kbit_training(
        quantized(settings["model"]), use_gradient_checkpointing=settings["recompute"],
        gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    config = LoraConfig(task_type="CAUSAL_LM", r=settings["rank"], target_modules="all-linear")
    return get_peft_model(model, config)


def of_unsloth(settings: dict[str, Any]) -> Any:
    """It reads weights from files: random ones are written first."""
    weights = Path(settings["weights"])
    if not (weights / "config.json").exists():
        with DEVICE:
            model = AutoModelForCausalLM.from_config(
                AutoConfig.from_pretrained(settings["model"]), dtype=torch.bfloat16
            )
        model.save_pretrained(weights)
        AutoTokenizer.from_pretrained(settings["model"]).save_pretrained(weights)
        del model
        torch.cuda.empty_cache()
    model, _ = unsloth.FastLanguageModel.from_pretrained(
        str(weights), max_seq_length=settings["longest"], dtype=torch.bfloat16, load_in_4bit=True
    )
    linears = [f"{name}_proj" for name in ("q", "k", "v", "o", "gate", "up", "down")]
    return unsloth.FastLanguageModel.get_peft_model(
        model, r=settings["rank"], target_modules=linears, use_gradient_checkpointing=settings["recompute"]
    )


def batches(settings: dict[str, Any]) -> Iterator[list[dict[str, torch.Tensor]]]:
    """Of each step its micro-batches, padded to their longest row."""
    tokenizer: Any = AutoTokenizer.from_pretrained(settings["model"])
    with open(settings["rows"], encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    size, at_once = settings["batch"], settings["rows_at_once"]
    for step in range(settings["steps"]):
        made = []
        for first in range(step * size, (step + 1) * size, at_once):
            rows = texts[first : min(first + at_once, (step + 1) * size)]
            given = tokenizer(
                rows, truncation=True, max_length=settings["longest"], padding=True, return_tensors="pt"
            )  # fmt: skip
            ids, mask = given["input_ids"], given["attention_mask"]
            made.append({"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, IGNORED)})
        yield made


def main() -> None:
    settings = json.loads(sys.argv[1])
    model = of_unsloth(settings) if settings["library"] == "unsloth" else of_transformers(settings)
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    on_gpu = DEVICE.type == "cuda"
    optimizer = bnb.optim.PagedAdamW8bit(trained, lr=1e-4) if on_gpu else torch.optim.AdamW(trained)
    model.train()
    if on_gpu:
        torch.cuda.reset_peak_memory_stats()
    steps, losses = [], []
    for micro_batches in batches(settings):
        tokens = sum(int(batch["attention_mask"].sum()) for batch in micro_batches)
        learned = sum(int((batch["labels"][:, 1:] != IGNORED).sum()) for batch in micro_batches)
        begun = time.perf_counter()
        summed = torch.zeros((), device=DEVICE)
        for batch in micro_batches:
            on_device = {name: tensor.to(DEVICE) for name, tensor in batch.items()}
            with torch.autocast(DEVICE.type, dtype=torch.bfloat16):
                loss = model(**on_device, use_cache=False, num_items_in_batch=learned).loss
            loss.backward()
            summed += loss.detach()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(summed.item())
        steps.append({"tokens": tokens, "seconds": time.perf_counter() - begun})
    peak = torch.cuda.max_memory_allocated() if on_gpu else resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    fused = {"attention": model.config._attn_implementation, "library": settings["library"]}
    print(json.dumps({"steps": steps, "peak_bytes": peak, "fused": fused, "losses": losses}))


if __name__ == "__main__":
    main()
