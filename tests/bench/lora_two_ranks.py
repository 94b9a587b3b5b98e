"""LoRA on two ranks with ragged pairs, beside transformers' Seq2SeqTrainer with PEFT: one JSON line."""

from __future__ import annotations

import functools

from _sides import WARM_UP, config, environment, in_turn, options, report, train_ours, train_peer, workplace
from _workload import MAX_SOURCE_TOKENS, MAX_TARGET_TOKENS, seq2seq

RANKS = 2
EXAMPLES = 128
MICRO_TOKENS = 4096
LORA_RANK = 16
PEER_MICRO_EXAMPLES = 16
"""Of 16, 32 and 64 the one with the least padding."""
STEPS = {"ours": 2, "trainer_peft": 1}
TARGETS = {"trainer_peft": 1.8}


def main() -> None:
    given = options(__doc__ or "", STEPS, rounds=3)
    with workplace() as folder:
        variables = environment(folder, max(1, given.threads // RANKS))
        work = seq2seq(folder)
        limits = {"max_source_tokens": MAX_SOURCE_TOKENS, "max_target_tokens": MAX_TARGET_TOKENS}
        ours = config(
            folder, "ours",
            model={"path": str(work.model)},
            task={"kind": "seq2seq", "source": "source", "target": "target", **limits},
            data={"train": str(work.pairs), "batching": given.batching},
            batch=given.batch(EXAMPLES, MICRO_TOKENS),
            tuning={"method": "lora", "rank": LORA_RANK, "targets": "all-linear"},
            duration={"steps": given.steps["ours"] + WARM_UP},
        )  # fmt: skip
        settings = {
            "model": str(work.model), "pairs": str(work.pairs), "out": str(folder / "trainer_peft"), **limits,
            "examples": EXAMPLES, "micro_examples": PEER_MICRO_EXAMPLES, "steps": given.steps["trainer_peft"] + WARM_UP,
            "sampling": "random", "lora_rank": LORA_RANK, "seed": 0,
        }  # fmt: skip
        sides = {
            "ours": functools.partial(train_ours, ours, variables, RANKS),
            "trainer_peft": functools.partial(train_peer, "_trainer_peer.py", settings, variables, RANKS),
        }
        found = in_turn(sides, given.rounds)
    report(
        "lora_two_ranks", found, TARGETS, ["torch", "transformers", "accelerate", "peft"], batching=given.batching,
        timed_steps=given.steps, ranks=RANKS, threads_per_rank=int(variables["OMP_NUM_THREADS"]),
        examples_per_step=EXAMPLES, peer_micro_examples=PEER_MICRO_EXAMPLES,
    )  # fmt: skip


if __name__ == "__main__":
    main()
