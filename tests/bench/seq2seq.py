"""Full fine-tuning of a small T5 on ragged real text, beside transformers' Seq2SeqTrainer: one JSON line."""

from __future__ import annotations

import functools

from _sides import WARM_UP, config, environment, in_turn, options, report, train_ours, train_peer, workplace
from _workload import MAX_SOURCE_TOKENS, MAX_TARGET_TOKENS, seq2seq

EXAMPLES = 128
MICRO_TOKENS = 4096
PEER_MICRO_EXAMPLES = {"trainer": 16, "trainer_grouped": 16}
"""Of 16, 32 and 64 the one with the least padding; with length grouping, where all were tried, also the fastest."""
SAMPLING = {"trainer": "random", "trainer_grouped": "group_by_length"}
STEPS = {"ours": 3, "trainer": 1, "trainer_grouped": 4}
"""Those of length grouping differ in length, so there are more of them."""
TARGETS = {"trainer": 2.5, "trainer_grouped": 1.25}


def main() -> None:
    given = options(__doc__ or "", STEPS, rounds=2)
    with workplace() as folder:
        variables = environment(folder, given.threads)
        work = seq2seq(folder)
        limits = {"max_source_tokens": MAX_SOURCE_TOKENS, "max_target_tokens": MAX_TARGET_TOKENS}
        ours = config(
            folder, "ours",
            model={"path": str(work.model)},
            task={"kind": "seq2seq", "source": "source", "target": "target", **limits},
            data={"train": str(work.pairs), "batching": given.batching},
            batch=given.batch(EXAMPLES, MICRO_TOKENS),
            duration={"steps": given.steps["ours"] + WARM_UP},
        )  # fmt: skip
        sides = {"ours": functools.partial(train_ours, ours, variables)}
        for name, sampling in SAMPLING.items():
            settings = {
                "model": str(work.model), "pairs": str(work.pairs), "out": str(folder / name), **limits,
                "examples": EXAMPLES, "micro_examples": PEER_MICRO_EXAMPLES[name], "steps": given.steps[name] + WARM_UP,
                "sampling": sampling, "lora_rank": 0, "seed": 0,
            }  # fmt: skip
            sides[name] = functools.partial(train_peer, "_trainer_peer.py", settings, variables)
        found = in_turn(sides, given.rounds)
    report(
        "seq2seq", found, TARGETS, ["torch", "transformers", "accelerate"], batching=given.batching,
        timed_steps=given.steps, threads=given.threads, examples_per_step=EXAMPLES,
        peer_micro_examples=PEER_MICRO_EXAMPLES,
    )  # fmt: skip


if __name__ == "__main__":
    main()
