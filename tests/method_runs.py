"""Every tuning method with no option of its own, on small models under several strategies; and what is asked of it.

A case is a method on a model under a strategy. All cases of several ranks are trained in one process group, one after
the other; where one of them fails, the group is started again with those after it.

What agrees. Ranks change the order in which float32 sums are taken, which moves a sum by about 1e-7 of its terms. A
gradient whose terms cancel is noise of that size, and AdamW divides every gradient by its own size, so it would make
whole steps of noise. With `eps` far above the noise such elements stay where they are, all others move as usual, and
what is left grows by a small factor with every step: a few steps keep it far below 1e-4 of a tensor's largest value.
"""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
import warnings
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any, NamedTuple, get_args

import torch
from peft import PeftModel
from safetensors.torch import load_file
from torch import Tensor
from transformers import AutoConfig, BitsAndBytesConfig, GenerationConfig

import plain
import tiny
from layouts import ARCHITECTURES
from shardtune.tuning_config import TuningConfig

TESTS = Path(__file__).parent
METHODS = [
    name
    for section in get_args(get_args(TuningConfig)[0])
    for name in get_args(section.model_fields["method"].annotation)
]
STRATEGIES = {"single": 1, "ddp": 2, "fsdp2": 2, "zero1": 2, "zero2": 2, "zero3": 2}
"""And their ranks."""
MODELS = ("t5", "llama")
OTHER_MODELS = {
    "bitfit": ("bart", "gpt2", "bert"), "qlora": ("bart", "gpt2"), "loha": ("gpt2",), "lokr": ("gpt2",),
    "oft": ("gpt2",),
}  # fmt: skip
"""Where the first two do not show all that a method can and cannot do."""
REFUSED = {
    ("bitfit", "t5"): "bias", ("bitfit", "llama"): "bias", ("qlora", "gpt2"): "gpt2", ("loha", "gpt2"): "gpt2",
    ("lokr", "gpt2"): "gpt2", ("oft", "gpt2"): "gpt2",
}  # fmt: skip
"""What does not exist, and a word of what is said to one who asks for it."""
FOUR_BIT = {"qlora", "qdora", "loftq"}
"""Methods whose base model is loaded in 4 bits."""
QUANTIZATION = BitsAndBytesConfig(
    load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_use_double_quant=True, bnb_4bit_compute_dtype=torch.float32
)

STEPS, EXAMPLES = 12, 8
RATES = {
    "full": 3e-3, "freeze": 3e-3, "lora+": 1e-3, "rslora": 3e-3, "bitfit": 3e-2, "ln_tuning": 3e-2, "ia3": 1e-1,
    "vera": 1e-1, "prefix": 1e-1, "prompt": 3e-1, "multitask_prompt": 3e-2, "p_tuning": 2e-2,
}  # fmt: skip
RATE = 1e-2
EPS = 1e-4
FALL = 0.98
"""The loss has to fall below so much of what it was; of the same examples and without dropout, so it has no noise."""
TOLERANCE = 1e-4
"""Of tensors, relative to the largest value of each, and of the reloaded model's loss."""
STALLED = 180.0
"""Seconds in which some run has to come to its end."""


class Case(NamedTuple):
    """One run."""

    method: str
    model: str
    strategy: str

    @property
    def name(self) -> str:
        return f"{self.method}-{self.model}-{self.strategy}".replace("+", "-plus")

    @property
    def task(self) -> str:
        return plain.task_of(ARCHITECTURES[self.model]["model_type"])

    @property
    def alone(self) -> Case:
        """The same in a single process."""
        return self._replace(strategy="single")


class Verdict(NamedTuple):
    """What became of a case."""

    case: Case
    before: float | None = None
    after: float | None = None
    difference: float | None = None
    """The largest to the run of a single process, relative to each tensor's largest value."""
    problem: str | None = None
    refused: bool = False

    @property
    def word(self) -> str:
        return self.problem or ("refused, as it should be" if self.refused else "ok")


def models_of(method: str) -> tuple[str, ...]:
    """The models that a method is tried on, those that have to refuse it included."""
    return MODELS + OTHER_MODELS.get(method, ())


class Trial:
    """Trains cases in a folder, and judges them."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.folder = folder
        self.seed = seed
        self._said: dict[Case, str] = {}
        self._refused: set[Case] = set()
        self._rows = tiny.rows(EXAMPLES, seed)
        tiny.write_rows(folder / "rows.jsonl", self._rows)

    def judge(self, cases: Iterable[Case]) -> list[Verdict]:
        """Trains all cases, and the single-process ones that they are compared with."""
        wanted = list(dict.fromkeys(cases))
        alone = list(dict.fromkeys(case.alone for case in wanted))
        self._train_alone(alone)
        for ranks in {count for count in STRATEGIES.values() if count > 1}:
            group = [case for strategy in STRATEGIES for case in wanted if case.strategy == strategy != "single"]
            self._train_together(
                [case for case in group if STRATEGIES[case.strategy] == ranks and self._finished(case.alone)]
            )
        return [self._verdict(case) for case in wanted]

    def run(self, case: Case) -> Path:
        """Its folder."""
        return self.folder / "runs" / case.name

    def said(self, case: Case) -> str:
        """What a run that failed said."""
        return self._said.get(case) or self._said.get(case.alone, "")

    # ------------------------------------------------------------------------------------------ training

    def _model(self, name: str) -> Path:
        """One that always writes a few words, so that there is something to compare."""
        folder = self.folder / "models" / name
        if not folder.is_dir():
            plain.make_model(folder, ARCHITECTURES[name], self.seed)
            if plain.task_of(ARCHITECTURES[name]["model_type"]) != "classification":
                settings = GenerationConfig.from_pretrained(folder)
                settings.min_new_tokens = 3
                words = plain.load_tokenizer(folder).convert_tokens_to_ids([*tiny.WORDS, "</s>"])
                settings.suppress_tokens = [
                    number for number in range(AutoConfig.from_pretrained(folder).vocab_size) if number not in words
                ]
                settings.save_pretrained(folder)
        return folder

    def _finished(self, case: Case) -> bool:
        return (self.run(case) / "final").is_dir()

    def _config(self, case: Case) -> Path:
        """What is learned is also what is judged: all examples in every step."""
        limits = {"max_source_tokens": plain.SOURCE_LIMIT}
        if case.task != "classification":
            limits["max_target_tokens"] = plain.TARGET_LIMIT
        ranks = STRATEGIES[case.strategy]
        return tiny.tiny_config(
            self.folder / "configs" / case.name,
            "t5",
            name=case.name,
            runs=str(self.folder / "runs"),
            seed=self.seed % 1000,
            model__path=str(self._model(case.model)),
            model__weights="pretrained",
            model__tokenizer=None,
            model__dropout=0.0,
            task={**tiny.TASKS[case.task], **limits},
            data={"train": str(self.folder / "rows.jsonl"), "validation": str(self.folder / "rows.jsonl")},
            tuning={"method": case.method},
            batch={"examples": EXAMPLES, "micro_examples": EXAMPLES // 2 // ranks},
            optimizer={"lr": RATES.get(case.method, RATE), "eps": EPS, "schedule": "constant", "warmup": 0},
            duration={"steps": STEPS},
            strategy={"kind": case.strategy},
            evaluation__examples=EXAMPLES,
        )

    def _environment(self) -> dict[str, str]:
        return {**os.environ, "SHARDTUNE_CACHE": str(self.folder / "cache"), "OMP_NUM_THREADS": "1"}

    def _train_alone(self, cases: Sequence[Case]) -> None:
        configs = {case: self._config(case) for case in cases}
        command = [sys.executable, str(TESTS / "ranks" / "train_each.py"), *map(str, configs.values())]
        ending = self._watch(command, cases, self.folder / "single.log")
        for case, config in configs.items():
            if not config.with_suffix(".json").exists():
                self._said[case] = ending
                continue
            ended = json.loads(config.with_suffix(".json").read_text())
            if ended["code"]:
                self._said[case] = ended["said"]
            if ended["code"] == 2:
                self._refused.add(case)

    def _train_together(self, cases: Sequence[Case]) -> None:
        """Cases of as many ranks, in one process group if all goes well."""
        left = list(cases)
        while left:
            configs = [str(self._config(case)) for case in left]
            ranks = STRATEGIES[left[0].strategy]
            torchrun = ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(ranks)]
            command = [sys.executable, *torchrun, "-m", "shardtune.assemble.many", *configs]
            ending = self._watch(command, left, self.folder / f"{ranks}-ranks-{len(left)}.log")
            unfinished = [case for case in left if not self._finished(case)]
            if unfinished:
                self._said[unfinished[0]] = ending
            left = unfinished[1:]

    def _watch(self, command: Sequence[str], cases: Sequence[Case], log: Path) -> str:
        """Runs the command to its end, or until none of its cases comes to an end for long. Returns what it said."""
        with log.open("w") as out:
            process = subprocess.Popen(command, env=self._environment(), stdout=out, stderr=out, start_new_session=True)
            seen, since = 0, time.monotonic()
            while process.poll() is None:
                now = sum(self._finished(case) or self._ended(case) for case in cases)
                if now > seen:
                    seen, since = now, time.monotonic()
                if time.monotonic() - since > STALLED:
                    os.killpg(process.pid, signal.SIGKILL)
                    process.wait()
                    out.write(f"\nHung: killed after {STALLED:.0f} seconds in which no run came to its end")
                time.sleep(0.05)
        return log.read_text()

    def _ended(self, case: Case) -> bool:
        return (self.folder / "configs" / case.name / "config.json").exists()

    # ------------------------------------------------------------------------------------------- judging

    def _verdict(self, case: Case) -> Verdict:
        word = REFUSED.get((case.method, case.model))
        if case.alone in self._refused:
            if word is not None and word in self._said[case.alone]:
                return Verdict(case, refused=True)
            return Verdict(case, problem=f"refused: {_last_line(self._said[case.alone])}")
        if not self._finished(case):
            said = self.said(case)
            missing = "NotImplementedError" in said
            return Verdict(case, problem="missing" if missing else f"failed: {_last_line(said)}")
        lines = [json.loads(line) for line in (self.run(case) / "metrics.jsonl").read_text().splitlines()]
        before = next(line["loss"] for line in lines if line["step"] == 1)
        after = [line["loss"] for line in lines if "split" in line][-1]
        difference = largest_difference(_tensors(self.run(case)), _tensors(self.run(case.alone)))
        problems = [] if word is None else ["should have been refused"]
        if not after < FALL * before:
            problems.append(f"the loss did not fall below {FALL} of what it was")
        if not difference <= TOLERANCE:
            problems.append(f"its result is not that of a single process: {difference:.1e}")
        problems += self.reload(case, after)
        return Verdict(case, before, after, difference, "; ".join(problems) or None)

    def reload(self, case: Case, loss: float) -> list[str]:
        """What is wrong with the result of a run that ended with `loss`, read by transformers and peft alone.

        peft warns of what is meant (normalization layers are tuned, positions left out, AdaLoRA's own names of ranks);
        what is computed shows whether the result was understood.
        """
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return self._reload(case, loss)

    def _reload(self, case: Case, loss: float) -> list[str]:
        try:
            model = load_plainly(self.run(case) / "final", self._model(case.model), case)
            tokenizer = plain.load_tokenizer(self.run(case) / "final")
            batch, more = plain.batch_of(tokenizer, case.task, self._rows), {}
            if case.method == "multitask_prompt":  # peft wants to be told which task each row is of
                batch["task_ids"], more = torch.zeros(EXAMPLES, dtype=torch.long), {"task_ids": torch.zeros(1).long()}
            # Given labels, peft's AdaLoRA adds the penalty of training, or fails where it is not trained.
            judged = model.get_base_model() if case.method == "adalora" else model
            reloaded = plain.evaluation_loss(judged, case.task, batch)
            written = [plain.predict(model, tokenizer, case.task, row, **more) for row in self._rows]
        except Exception as error:
            return [f"cannot be reloaded: {type(error).__name__}: {_last_line(str(error))}"]
        problems = []
        if not abs(reloaded - loss) <= TOLERANCE * abs(loss):
            problems.append(f"reloaded, its loss is {reloaded:.6f}, not {loss:.6f}")
        predictions = plain.read_rows(self.run(case) / "predictions" / f"step-{STEPS}-validation.jsonl")
        wanted = [row["prediction"] for row in predictions]
        if written != wanted:
            problems.append(f"reloaded, it predicts {written}, not {wanted}")
        return problems if any(wanted) else [*problems, "it predicts nothing"]


def load_plainly(folder: Path, base: Path, case: Case) -> Any:
    """The result in `folder`, as transformers or peft loads it, in float32."""
    auto = plain.AUTO[case.task]
    if not (folder / "adapter_config.json").exists():
        settings = {"trust_remote_code": True} if case.method == "adapter" else {}
        model, info = auto.from_pretrained(folder, dtype=torch.float32, output_loading_info=True, **settings)
        assert not any(info.values()), info
        return model
    settings = {"quantization_config": QUANTIZATION} if case.method in FOUR_BIT else {}
    model = auto.from_pretrained(base, dtype=torch.float32, **settings)
    for module in model.modules():  # or the first forward in eval mode stores 4-bit weights otherwise, for good
        if hasattr(module, "support_avx512bf16_for_cpu"):
            module.support_avx512bf16_for_cpu = False
    return PeftModel.from_pretrained(model, str(folder))


def largest_difference(got: dict[str, Tensor], wanted: dict[str, Tensor]) -> float:
    """Over all elements, relative to the largest value of each tensor; infinite where names or shapes differ.

    AdaLoRA leaves layers of rank 0, whose tensors have no elements.
    """
    if {name: tensor.shape for name, tensor in got.items()} != {name: tensor.shape for name, tensor in wanted.items()}:
        return float("inf")
    largest = [
        (got[name].double() - whole.double()).abs().max() / whole.double().abs().max().clamp(min=1e-30)
        for name, whole in wanted.items()
        if whole.numel()
    ]
    return float(torch.stack(largest).nan_to_num(nan=float("inf")).max())


def _tensors(run: Path) -> dict[str, Tensor]:
    files = sorted((run / "final").glob("*.safetensors"))
    return {name: tensor for file in files for name, tensor in load_file(file).items()}


def _last_line(text: str) -> str:
    """The line that says what went wrong: the last one that names an error, else the last."""
    lines = [line.strip() for line in text.splitlines() if line.strip()]
    named = [line for line in lines if "Error:" in line or "error:" in line or line.startswith("Hung")]
    if "shardtune: error (exit code 2)" in lines:  # what follows it says what is wrong
        return lines[lines.index("shardtune: error (exit code 2)") + 1]
    return (named or lines or ["it said nothing"])[-1]
