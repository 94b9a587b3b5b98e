"""The peer: TRL's SFTTrainer on prompts and completions, unpacked or packed. Runs in the peers' environment.

The first argument is a JSON object of settings; see `main`. Writes the steps to <out>.0, and to <out>.facts what else
the benchmark tells.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
from _timing import Notes
from datasets import load_dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, logging
from trl import SFTConfig, SFTTrainer


def main() -> None:
    """Trains for `steps` steps of about `examples` examples, `micro_rows` at once: examples, or packed rows."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings: dict[str, Any] = json.loads(sys.argv[1])
    tokenizer: Any = AutoTokenizer.from_pretrained(settings["model"])
    model: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    pairs: Any = load_dataset("json", data_files=settings["pairs"], split="train")
    pairs = pairs.rename_columns({"source": "prompt", "target": "completion"})

    rows_per_step = settings["examples"]
    if settings["packing"]:  # rows that hold as many tokens as the examples of a step
        both = [p + c for p, c in zip(pairs["prompt"], pairs["completion"], strict=True)]
        tokens = sum(len(ids) + 1 for ids in tokenizer(both, verbose=False)["input_ids"])
        rows_per_step = tokens / len(pairs) * rows_per_step / settings["max_length"]
    micro_batches = math.ceil(rows_per_step / settings["micro_rows"])
    arguments = SFTConfig(
        output_dir=settings["out"] + ".trainer",
        max_steps=settings["steps"],
        max_length=settings["max_length"],
        packing=settings["packing"],
        completion_only_loss=True,
        per_device_train_batch_size=settings["micro_rows"],
        gradient_accumulation_steps=micro_batches,
        optim="adamw_torch",
        learning_rate=1e-4,
        max_grad_norm=1.0,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=True,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=settings["seed"],
    )
    trainer: Any = SFTTrainer(model=model, args=arguments, train_dataset=pairs, processing_class=tokenizer)
    notes = Notes(Path(settings["out"] + ".0"), trainer.data_collator, micro_batches, one_sequence=True)
    trainer.data_collator = notes.collate  # given to the constructor, packing would refuse it
    trainer.add_callback(notes)
    trainer.train()
    facts = {"isolates_documents": _isolates(trainer)} if settings["packing"] else {}
    Path(settings["out"] + ".facts").write_text(json.dumps(facts), encoding="utf-8")


def _isolates(trainer: Any) -> bool:
    """Whether the last document of a packed row computes the same whatever stands before it."""
    rows = [row for row in trainer.train_dataset.select(range(50)) if len(row["seq_lengths"]) > 1]
    inputs = trainer._prepare_inputs(trainer.data_collator(rows[-1:]))
    inputs = {name: value for name, value in inputs.items() if name != "labels"}
    last = rows[-1]["seq_lengths"][-1]
    model = trainer.model.eval()
    with torch.no_grad():
        before = model(**inputs, use_cache=False).logits[:, -last:]
        inputs["input_ids"] = inputs["input_ids"].clone()
        inputs["input_ids"][:, :-last] = inputs["input_ids"][:, :-last].flip(1)
        after = model(**inputs, use_cache=False).logits[:, -last:]
    return bool(torch.allclose(before, after, atol=1e-5))


if __name__ == "__main__":
    main()
