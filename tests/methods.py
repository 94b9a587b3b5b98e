"""Every tuning method with no option, on a small T5 and a small Llama, under several strategies.

    python tests/methods.py                     all methods, models and strategies
    python tests/methods.py --methods lora,dora --models t5 --strategies single,fsdp2
    python tests/methods.py --keep FOLDER       runs and logs stay there

Of each it is asked that the loss falls, that the result is that of a single process to 1e-4 of each tensor's largest
value, and that transformers and peft reload it and predict the same, token for token; or that it is refused.
"""

from __future__ import annotations

import argparse
import contextlib
import os
import random
import sys
import tempfile
from pathlib import Path

import torch

from method_runs import METHODS, OTHER_MODELS, STRATEGIES, Case, Trial, Verdict, models_of
from shardtune.assemble.quiet import quiet_libraries
from shardtune.text_table import table

WHOLE = ["single", "ddp", "fsdp2", "zero3"]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", default=",".join(METHODS))
    parser.add_argument("--models", default="")
    parser.add_argument("--strategies", default=",".join(WHOLE))
    parser.add_argument("--seed", type=int, default=None)
    parser.add_argument("--keep", type=Path, default=None)
    options = parser.parse_args()
    given = os.environ.get("SHARDTUNE_TEST_SEED")
    seed = options.seed if options.seed is not None else int(given or random.SystemRandom().randrange(2**31))
    methods, strategies = options.methods.split(","), options.strategies.split(",")
    models = options.models.split(",") if options.models else None
    for word, known in [*((m, METHODS) for m in methods), *((s, [*STRATEGIES]) for s in strategies)]:
        if word not in known:
            parser.error(f"{word!r} is none of {', '.join(known)}")
    cases = [
        Case(method, model, strategy)
        for method in methods
        for model in models_of(method)
        for strategy in strategies
        if models is None or model in models
    ]
    if not cases:
        parser.error(f"no method has these models; there are t5, llama and {OTHER_MODELS}")
    torch.set_num_threads(1)  # more only wait for each other on models this small
    if options.keep is not None:
        options.keep.mkdir(parents=True)
    place = contextlib.nullcontext(options.keep) if options.keep else tempfile.TemporaryDirectory()
    with place as folder, quiet_libraries():
        trial = Trial(Path(folder), seed)
        verdicts = trial.judge(cases)
        failed = [verdict for verdict in verdicts if verdict.problem is not None]
        for verdict in failed:
            if verdict.problem != "missing" and (said := trial.said(verdict.case)):
                print(f"--- {verdict.case.name}\n{said[-3000:]}")
    print(describe(verdicts))
    print(f"{len(verdicts) - len(failed)} of {len(verdicts)} as they should be; seed {seed}")
    return 1 if failed else 0


def describe(verdicts: list[Verdict]) -> str:
    """A row for each case."""

    def number(value: float | None, form: str) -> str:
        return "" if value is None else format(value, form)

    rows = [
        [v.case.method, v.case.model, v.case.strategy, number(v.before, ".3f"), number(v.after, ".3f"),
         number(v.difference, ".1e"), v.word]
        for v in verdicts
    ]  # fmt: skip
    return table(rows, ["method", "model", "strategy", "loss", "after", "difference", ""])


if __name__ == "__main__":
    sys.exit(main())
