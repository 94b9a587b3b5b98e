"""Full fine-tuning of a small Llama on prompts and completions, beside TRL's SFTTrainer: one JSON line.

The loss is on the completions only. Both of TRL's ways are there: padded batches, and packed rows.
"""

from __future__ import annotations

import functools
import json
import sys
from pathlib import Path
from typing import Any

from _sides import (
    PEERS_PYTHON,
    WARM_UP,
    config,
    environment,
    in_turn,
    options,
    report,
    train_ours,
    train_peer,
    workplace,
)
from _workload import MAX_SOURCE_TOKENS, MAX_TARGET_TOKENS, causal

EXAMPLES = 128
MICRO_TOKENS = 4096
PEER_MICRO_ROWS = {"trl": 8, "trl_packed": 1}
"""Of 8, 16 and 32 examples those with the least padding; one packed row was faster than two."""
PEER_MAX_LENGTH = MAX_SOURCE_TOKENS + MAX_TARGET_TOKENS
STEPS = {"ours": 3, "trl": 1, "trl_packed": 3}
TARGETS = {"trl": 2.3, "trl_packed": 1.0}


def main() -> None:
    given = options(__doc__ or "", STEPS, rounds=2)
    with workplace() as folder:
        variables = environment(folder, given.threads)
        work = causal(folder)
        ours = config(
            folder, "ours",
            model={"path": str(work.model)},
            task={
                "kind": "causal", "source": "source", "target": "target",
                "max_source_tokens": MAX_SOURCE_TOKENS, "max_target_tokens": MAX_TARGET_TOKENS,
            },
            data={"train": str(work.pairs), "batching": given.batching},
            batch=given.batch(EXAMPLES, MICRO_TOKENS),
            duration={"steps": given.steps["ours"] + WARM_UP},
        )  # fmt: skip
        sides = {"ours": functools.partial(train_ours, ours, variables)}
        if PEERS_PYTHON.exists():
            for name, rows in PEER_MICRO_ROWS.items():
                settings = {
                    "model": str(work.model), "pairs": str(work.pairs), "out": str(folder / name),
                    "max_length": PEER_MAX_LENGTH, "examples": EXAMPLES, "micro_rows": rows,
                    "steps": given.steps[name] + WARM_UP, "packing": name == "trl_packed", "seed": 0,
                }  # fmt: skip
                sides[name] = functools.partial(train_peer, "_trl_peer.py", settings, variables)
        else:
            print("bench: TRL is not installed (`make bench` does it); its figures are null", file=sys.stderr)
        found = in_turn(sides, given.rounds)
        facts = _facts(folder / "trl_packed.facts")
    report(
        "causal", found, TARGETS, ["torch", "transformers", "trl"], batching=given.batching, timed_steps=given.steps,
        threads=given.threads, examples_per_step=EXAMPLES, peer_micro_rows=PEER_MICRO_ROWS,
        peer_max_length=PEER_MAX_LENGTH,
        isolates_documents={"ours": True, "trl_packed": facts.get("isolates_documents")},
    )  # fmt: skip


def _facts(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text(encoding="utf-8")) if path.exists() else {}


if __name__ == "__main__":
    main()
