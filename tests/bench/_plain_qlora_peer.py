"""QLoRA as transformers, peft and bitsandbytes give it, in a plain loop: the other side of gpu_qlora.py.

Takes one JSON object of settings, prints one of results.
"""

from __future__ import annotations

import json
import resource
import sys
import time
from typing import Any

import bitsandbytes as bnb
import torch
from _sides import WARM_UP
from peft import LoraConfig, get_peft_model, prepare_model_for_kbit_training
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer


def quantized(path: str, device: torch.device) -> Any:
    """A model with random weights whose linear layers are made, filled and quantized one after the other."""
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(path), dtype=torch.bfloat16)
    for name, module in list(model.named_modules()):
        if isinstance(module, nn.Linear) and name != "lm_head":
            four = bnb.nn.Linear4bit(
                module.in_features, module.out_features, module.bias is not None, torch.bfloat16, True, "nf4",
                device="meta",
            )  # fmt: skip
            values = torch.randn(module.weight.shape, dtype=torch.bfloat16, device=device) * 0.02
            four.weight = bnb.nn.Params4bit(values.cpu(), requires_grad=False, quant_type="nf4").to(device)
            outer, _, key = name.rpartition(".")
            setattr(model.get_submodule(outer), key, four)
    for module in model.modules():
        for key, parameter in module._parameters.items():
            if parameter is not None and parameter.is_meta:
                filled = torch.randn(parameter.shape, dtype=torch.bfloat16, device=device) * 0.02
                module._parameters[key] = nn.Parameter(filled if parameter.dim() > 1 else torch.ones_like(filled))
    rotary = type(model.model.rotary_emb)(model.config)
    model.model.rotary_emb = rotary.to(device)
    model.is_loaded_in_4bit = True
    return model


def main() -> None:
    settings = json.loads(sys.argv[1])
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer: Any = AutoTokenizer.from_pretrained(settings["model"])
    model = prepare_model_for_kbit_training(
        quantized(settings["model"], device), gradient_checkpointing_kwargs={"use_reentrant": False}
    )
    model = get_peft_model(model, LoraConfig(task_type="CAUSAL_LM", r=settings["rank"], target_modules="all-linear"))
    trained = [parameter for parameter in model.parameters() if parameter.requires_grad]
    optimizer = bnb.optim.PagedAdamW8bit(trained, lr=1e-4) if device.type == "cuda" else torch.optim.AdamW(trained)
    model.train()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
    seconds = []
    with open(settings["rows"], encoding="utf-8") as file:
        texts = [json.loads(line)["text"] for line in file]
    for text in texts:
        ids = tokenizer(text, truncation=True, max_length=settings["tokens"], return_tensors="pt")["input_ids"]
        begun = time.perf_counter()
        ids = ids.to(device)
        with torch.autocast(device.type, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        loss.item()
        seconds.append(time.perf_counter() - begun)
    timed = seconds[WARM_UP:]
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if device.type == "cuda":
        peak = torch.cuda.max_memory_allocated()
    speed = settings["tokens"] * len(timed) / sum(timed)
    print(json.dumps({"tokens_per_second": speed, "peak_bytes": peak, "last_loss": loss.item()}))


if __name__ == "__main__":
    main()
