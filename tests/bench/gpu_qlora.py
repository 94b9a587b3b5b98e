"""G6: the QLoRA step of an 8B-shaped model with random weights, in real tokens a second: one JSON line.

4 rows of 2,048 tokens, activations kept and recomputed; short ragged rows, which the peer pads and we pack; and the
memory of one row. Ours is the run that a user starts; beside it a plain loop of transformers, peft and bitsandbytes on
the same rows with the same recompute, and Unsloth where it is installed, each in a process of its own, in turn. Peak
memory is what the allocator handed out. What is compared first: losses of our run, fused and as transformers computes.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import torch
import yaml
from _gpu_line import Absent, Benchmark, Target, case_of, installed, reason
from _sides import ROOT, workplace
from _workload import PIECES
from transformers import LlamaConfig

from shardtune.data.docs import python_docs
from shardtune.model.tokenizer import load_tokenizer, train_tokenizer

FASTER, FASTER_RAGGED = 1.6, 4.0
CEILING, SHARE = {"kept": 24_800, "recomputed": 17_000}, 0.65
"""Tokens a second that an H200 can reach by counted FLOPs and bytes, and the share of them that a step should."""
ONE_ROW_BYTES = 12e9
"""Of the card that the step of one row must fit."""
WARM_UP, STEPS, RANK = 3, 6, 16
AGREE = {"float32": 1e-5, "bfloat16": 1e-3}
"""How far losses may differ between fused and plain operations; four steps of training move them by more, 4e-3."""
EIGHT_BILLION = {
    "vocab_size": 128_256, "hidden_size": 4096, "intermediate_size": 14_336, "num_attention_heads": 32,
    "num_key_value_heads": 8, "max_position_embeddings": 8192, "num_hidden_layers": 32,
}  # fmt: skip
TINY = {
    "vocab_size": 600, "hidden_size": 64, "intermediate_size": 96, "num_attention_heads": 2, "num_key_value_heads": 1,
    "max_position_embeddings": 256, "num_hidden_layers": 1,
}  # fmt: skip


class Work(NamedTuple):
    """Rows of text, `batch` of them a step, cut to `longest` tokens."""

    name: str
    rows: Path
    batch: int
    longest: int
    recompute: bool = True
    packed: bool = False
    peer_rows: tuple[int, ...] = ()
    """How many the peer pads and computes at once: each is a side of its own."""


class Run(NamedTuple):
    """What one side's process found."""

    steps: list[dict[str, float]]
    """Real tokens and seconds of each timed step."""
    peak_bytes: int
    fused: Any
    """Of each fused operation in how many modules it is, or why in none."""
    losses: list[float]

    @property
    def milliseconds(self) -> float:
        return sum(step["seconds"] for step in self.steps) / len(self.steps) * 1e3

    @property
    def tokens_per_second(self) -> float:
        return sum(step["tokens"] for step in self.steps) / sum(step["seconds"] for step in self.steps)


class Place:
    """A folder with the model and rows, and what runs in it."""

    def __init__(self, folder: Path, small: bool) -> None:
        self.folder, self.small = folder, small
        self.model = folder / "model"
        self.variables = {**os.environ, "SHARDTUNE_CACHE": str(folder / "cache"), "HF_HUB_OFFLINE": "1"}
        texts = [pair.document for pair in python_docs()][: 60 if small else None]
        self.tokenizer = self.write_model(self.model, texts, TINY if small else EIGHT_BILLION)
        self.ids = self.tokenizer("\n".join(texts), verbose=False)["input_ids"]
        self.steps = WARM_UP + (1 if small else STEPS)

    def write_model(self, folder: Path, texts: list[str], shape: Mapping[str, int]) -> Any:
        """An architecture without weights, and a tokenizer."""
        train_tokenizer(texts, 500 if self.small else PIECES, "causal", folder)
        tokenizer: Any = load_tokenizer(str(folder), "right", False)
        special = {f"{name}_token_id": getattr(tokenizer, f"{name}_token_id") for name in ("pad", "eos", "bos")}
        LlamaConfig(tie_word_embeddings=False, **special, **shape).save_pretrained(str(folder))
        return tokenizer

    def rows(self, name: str, lengths: list[int]) -> Path:
        """A file of texts of about so many tokens."""
        path, begin = self.folder / f"{name}.jsonl", 0
        with path.open("w", encoding="utf-8") as file:
            for length in lengths:
                if begin + length > len(self.ids):
                    begin = 0
                part = self.ids[begin : begin + length]
                begin += length
                file.write(json.dumps({"text": self.tokenizer.decode(part, skip_special_tokens=True)}) + "\n")
        return path

    def full_rows(self, batch: int, tokens: int) -> Path:
        """A few tokens more than a row holds: both sides cut."""
        return self.rows(f"full-{batch}", [tokens + tokens // 8 + 8] * batch * self.steps)

    def ours(self, work: Work, steps: int, **more: Any) -> Run:
        """The run that a user starts."""
        batch = {"examples": work.batch, "micro_examples": work.batch}
        if work.packed:
            batch = {"examples": work.batch, "micro_tokens": 4 * work.longest}
        model = {"path": str(self.model), "weights": "random", "recompute": "full" if work.recompute else "none"}
        config = {
            "name": "ours", "runs": str(self.folder / "runs"), "model": {**model, **more.pop("model", {})},
            "task": {"kind": "causal", "text": "text", "max_source_tokens": work.longest},
            "data": {
                "train": str(work.rows), "shuffle": False, "splits": [1.0, 0.0, 0.0],
                "batching": "packed" if work.packed else "padded",
            },
            "batch": batch, "tuning": {"method": "qlora", "rank": RANK},
            "optimizer": {"name": "adamw" if self.small else "paged_adamw_8bit"},
            "duration": {"steps": steps}, "evaluation": {"baseline": False}, "checkpoint": {"resume": "never"},
            "tracking": {"tensorboard": False, "every": 1}, **more,
        }  # fmt: skip
        path = self.folder / "ours.yaml"
        path.write_text(yaml.safe_dump(config, sort_keys=False), encoding="utf-8")
        ended([sys.executable, "launch/train.py", "--config", str(path)], self.variables)
        run = self.folder / "runs" / "ours"
        lines = [json.loads(line) for line in (run / "metrics.jsonl").read_text(encoding="utf-8").splitlines()]
        tokens = np.diff([0, *(line["tokens"] for line in lines)]).tolist()
        taken = [{"tokens": t, "seconds": line["step_seconds"]} for t, line in zip(tokens, lines, strict=True)]
        environment = json.loads((run / "environment.json").read_text(encoding="utf-8"))
        peak = max(line["peak_memory_bytes"] for line in lines)
        return Run(taken[WARM_UP:], peak, environment["fused"], [line["loss"] for line in lines])

    def peer(self, work: Work, library: str, rows: int) -> Run:
        if library == "unsloth" and installed("unsloth") is None:
            raise Absent("is not installed")
        settings = {
            "library": library, "model": str(self.model), "rows": str(work.rows), "longest": work.longest,
            "batch": work.batch, "rows_at_once": rows, "rank": RANK, "recompute": work.recompute, "steps": self.steps,
            "weights": str(self.folder / "weights"),
        }  # fmt: skip
        script = [sys.executable, str(Path(__file__).with_name("_plain_qlora_peer.py")), json.dumps(settings)]
        found = json.loads(ended(script, self.variables).splitlines()[-1])
        return Run(found["steps"][WARM_UP:], found["peak_bytes"], found["fused"], found["losses"])


def ended(command: list[str], variables: Mapping[str, str]) -> str:
    """What a process printed; a failure is shown, and raised with its last line."""
    done = subprocess.run(command, env=variables, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        print(done.stdout[-2000:] + done.stderr[-4000:], file=sys.stderr)
        last = (done.stderr.strip() or "nothing was said").splitlines()[-1]
        raise Absent(f"ended with exit code {done.returncode}: {last}")
    return done.stdout


def compare(place: Place, work: Work, dtypes: Iterable[str]) -> dict[str, dict[str, Any]]:
    """Losses of a small model over some steps, fused and not, from the same weights: gradients decide all but the
    first."""
    found = {}
    for dtype in dtypes:
        more = {"model": {"dtype": dtype}, "optimizer": {"name": "adamw", "lr": 1e-2}}
        fused, plain = (place.ours(work, 4, **more, kernels={"fused": on}).losses for on in ("auto", "off"))
        off = max(abs(a - b) / abs(b) for a, b in zip(fused, plain, strict=True))
        found[dtype] = {"largest_error": off, "ok": off <= AGREE[dtype], "where": "losses of four steps"}
    return found


def measure(place: Place, work: Work, rounds: int) -> dict[str, Any]:
    """One case: all sides in turn, `rounds` times."""
    sides: dict[str, Callable[[], Run]] = {"ours": lambda: place.ours(work, place.steps)}
    for rows in work.peer_rows:
        said = "transformers + peft + bitsandbytes" + (f", {rows} rows at once" if len(work.peer_rows) > 1 else "")
        sides[said] = lambda rows=rows: place.peer(work, "transformers", rows)
    sides["unsloth"] = lambda: place.peer(work, "unsloth", work.peer_rows[-1])
    runs: dict[str, list[Run]] = {name: [] for name in sides}
    absent: dict[str, str] = {}
    for _ in range(rounds):
        for name, side in sides.items():
            if name in absent:
                continue
            print(f"gpu_qlora: {work.name}, recompute {work.recompute}: {name}", file=sys.stderr)
            try:
                runs[name].append(side())
            except Absent as problem:
                absent[name] = reason(problem)
                runs[name] = []
    found = {name: of for name, of in runs.items() if of}
    times = {name: statistics.median(run.milliseconds for run in of) for name, of in found.items()}
    speeds = {name: statistics.median(run.tokens_per_second for run in of) for name, of in found.items()}
    peaks = {name: max(run.peak_bytes for run in of) for name, of in found.items()}
    return case_of(
        {"ours": None, **times}, absent, targets=targets(work, times, speeds, peaks), what=work.name,
        recompute=work.recompute, rows_a_step=work.batch, longest=work.longest, tokens_per_second=speeds,
        tokens_a_step={name: sum(s["tokens"] for s in of[0].steps) / len(of[0].steps) for name, of in found.items()},
        peak_bytes=peaks, fused={name: of[0].fused for name, of in found.items()},
        last_loss={name: of[0].losses[-1] for name, of in found.items()},
    )  # fmt: skip


def targets(
    work: Work, times: Mapping[str, float], speeds: Mapping[str, float], peaks: Mapping[str, int]
) -> dict[str, Target]:
    """By real tokens a second, of the fastest of what transformers' side was tried with."""
    if work.batch == 1:
        return {"peak bytes": Target(peaks.get("ours"), ONE_ROW_BYTES, at_most=True)}
    plain = max((speed for name, speed in speeds.items() if name.startswith("transformers")), default=None)
    faster = speeds["ours"] / plain if "ours" in speeds and plain else None
    found = {"transformers + peft + bitsandbytes": Target(faster, FASTER_RAGGED if work.packed else FASTER)}
    if torch.cuda.is_available() and "H200" in torch.cuda.get_device_name() and not work.packed and "ours" in speeds:
        ceiling = CEILING["recomputed" if work.recompute else "kept"]
        found["share of the ceiling"] = Target(speeds["ours"] / ceiling, SHARE)
    return found


def lengths(count: int, median: int, longest: int) -> list[int]:
    """Lognormal, as of chats and instructions."""
    drawn = np.random.default_rng(0).lognormal(np.log(median), 0.8, count)
    return np.clip(drawn.astype(int), 4, longest).tolist()


def main() -> None:
    bench = Benchmark("G6", __doc__, ["transformers", "peft", "bitsandbytes", "unsloth"], rounds=2)
    tokens, batch, ragged = (32, 2, 4) if bench.small else (2048, 4, 16)
    with workplace() as folder:
        tiny = Place(folder / "tiny", small=True)
        dtypes = ["float32"] if bench.small else AGREE
        bench.correct(compare(tiny, Work("tiny", tiny.rows("compared", [64] * 8), 2, 32), dtypes))
        place = tiny if bench.small else Place(folder / "whole", small=False)
        full = place.full_rows(batch, tokens)
        short = place.rows("short", lengths(ragged * place.steps, tokens // 8, tokens))
        works = [
            Work(f"{batch} rows of {tokens}", full, batch, tokens, False, peer_rows=(batch,)),
            Work(f"{batch} rows of {tokens}", full, batch, tokens, True, peer_rows=(batch,)),
            Work("short ragged rows", short, ragged, tokens, True, True, (ragged // 2, ragged)),
            Work(f"one row of {tokens}", place.full_rows(1, tokens), 1, tokens, True, peer_rows=(1,)),
        ]
        bench.report([measure(place, work, bench.rounds) for work in works])


if __name__ == "__main__":
    main()
