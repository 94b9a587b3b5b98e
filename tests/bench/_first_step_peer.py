"""The peer of first_step.py: a plain script around Seq2SeqTrainer, as its documentation writes it.

The first argument is a JSON object of settings. The file <out> is written when the first step has ended.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

from datasets import load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    TrainerCallback,
)

settings: dict[str, Any] = json.loads(sys.argv[1])
tokenizer: Any = AutoTokenizer.from_pretrained(settings["model"])
model = AutoModelForSeq2SeqLM.from_pretrained(settings["model"])
limits = settings["max_source_tokens"], settings["max_target_tokens"]


def tokenize(rows: dict[str, list[str]]) -> Any:
    encoded = tokenizer(rows["source"], max_length=limits[0], truncation=True)
    encoded["labels"] = tokenizer(text_target=rows["target"], max_length=limits[1], truncation=True)["input_ids"]
    return encoded


class Ended(TrainerCallback):
    def on_step_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        Path(settings["out"]).write_text("ended", encoding="utf-8")


pairs: Any = load_dataset("json", data_files=settings["pairs"], split="train")
pairs = pairs.map(tokenize, batched=True, remove_columns=["source", "target"])
trainer = Seq2SeqTrainer(
    model=model,
    args=Seq2SeqTrainingArguments(
        output_dir=settings["out"] + ".trainer",
        max_steps=1,
        per_device_train_batch_size=settings["examples"],
        optim="adamw_torch",
        use_cpu=True,
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    ),
    train_dataset=pairs,
    data_collator=DataCollatorForSeq2Seq(tokenizer, model=model),
    processing_class=tokenizer,
    callbacks=[Ended()],
)
trainer.train()
