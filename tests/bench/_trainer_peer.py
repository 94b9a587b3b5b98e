"""The peer: transformers' Seq2SeqTrainer, with PEFT for LoRA; on one rank, or on several under torchrun.

The first argument is a JSON object of settings; see `main`. Writes the steps of each rank to <out>.<rank>.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
from _timing import Notes, some_of
from datasets import load_dataset
from transformers import (
    AutoModelForSeq2SeqLM,
    AutoTokenizer,
    DataCollatorForSeq2Seq,
    Seq2SeqTrainer,
    Seq2SeqTrainingArguments,
    logging,
)

WARM_UP = 1


def main() -> None:
    """Trains for `steps` steps, the first of them to warm up, of `examples` examples, `micro_examples` at once."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings: dict[str, Any] = json.loads(sys.argv[1])
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    tokenizer: Any = AutoTokenizer.from_pretrained(settings["model"])
    model: Any = AutoModelForSeq2SeqLM.from_pretrained(settings["model"], dtype=torch.float32)
    if settings["lora_rank"]:
        from peft import LoraConfig, get_peft_model

        lora = LoraConfig(task_type="SEQ_2_SEQ_LM", r=settings["lora_rank"], lora_alpha=32, target_modules="all-linear")
        model = get_peft_model(model, lora)

    def tokenize(rows: dict[str, list[str]]) -> Any:
        encoded = tokenizer(rows["source"], max_length=settings["max_source_tokens"], truncation=True)
        targets = tokenizer(text_target=rows["target"], max_length=settings["max_target_tokens"], truncation=True)
        return {**encoded, "labels": targets["input_ids"]}

    pairs: Any = load_dataset("json", data_files=settings["pairs"], split="train")
    pairs = pairs.map(tokenize, batched=True, remove_columns=["source", "target"])

    micro_batches = settings["examples"] // settings["micro_examples"] // ranks
    arguments = Seq2SeqTrainingArguments(
        output_dir=settings["out"] + ".trainer",
        max_steps=settings["steps"],
        per_device_train_batch_size=settings["micro_examples"],
        gradient_accumulation_steps=micro_batches,
        train_sampling_strategy=settings["sampling"],
        optim="adamw_torch",
        learning_rate=1e-4,
        max_grad_norm=1.0,
        use_cpu=True,
        ddp_backend="gloo" if ranks > 1 else None,
        ddp_find_unused_parameters=False if ranks > 1 else None,
        save_strategy="no",
        eval_strategy="no",
        logging_strategy="no",
        report_to="none",
        disable_tqdm=True,
        seed=settings["seed"],
    )

    class Trainer(Seq2SeqTrainer):
        """Takes steps from all over what length grouping has sorted."""

        def _get_train_sampler(self, *given: Any) -> Any:
            sampler: Any = super()._get_train_sampler(*given)
            order, per_step = list(sampler), settings["examples"]
            groups = max(settings["steps"], min(len(order) // (per_step * 4), 50))  # as LengthGroupedSampler
            timed = some_of(order, per_step, groups, settings["steps"] - WARM_UP)
            return timed[-per_step * WARM_UP :] + timed

    collator: Any = DataCollatorForSeq2Seq(tokenizer, model=model)
    notes = Notes(Path(f"{settings['out']}.{rank}"), collator, micro_batches, one_sequence=False)
    trainer = Trainer(
        model=model, args=arguments, train_dataset=pairs, data_collator=notes.collate, processing_class=tokenizer,
        callbacks=[notes],
    )  # fmt: skip
    trainer.train()
    if ranks > 1:
        torch.distributed.destroy_process_group()


if __name__ == "__main__":
    main()
