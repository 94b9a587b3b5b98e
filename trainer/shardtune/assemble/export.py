"""Taking a result away: as it is, or an adapter merged into its base model. One process, on the CPU."""

from __future__ import annotations

import gc
import json
import math
import random
import shutil
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any, Literal, NamedTuple, cast

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from shardtune import bottleneck
from shardtune.assemble.loading import base_model, load_result, with_adapter
from shardtune.assemble.parts import DTYPES, saved_labels
from shardtune.assemble.quiet import quiet_libraries
from shardtune.assemble.tunings import quantization_of
from shardtune.config import Config
from shardtune.errors import ConfigError, NumbersError, StorageError
from shardtune.examples import Batch, Text, Tokens
from shardtune.heads import HEADS
from shardtune.model.quantized import dequantize_layers
from shardtune.model.skeleton import load_model
from shardtune.model.tokenizer import load_tokenizer, save_tokenizer
from shardtune.protocols import Task
from shardtune.task.architecture import keeps_logits
from shardtune.task.chat import Chat
from shardtune.task.section import Parts
from shardtune.tuning_config import LoftqConfig

EXAMPLES = 4
"""Compared before and after a merge."""
TOKENS = 64
"""Of an example's source, and of its target, that are compared at most."""
TOLERANCES = {torch.float32: 1e-4, torch.float16: 0.02, torch.bfloat16: 0.1}
"""How far logits may move, as a share of the largest of them, where weights are rounded to a dtype; the computation
is in float32."""

PROMPTS = ("PREFIX_TUNING", "PROMPT_TUNING", "P_TUNING", "MULTITASK_PROMPT_TUNING")
"""Kinds of adapters, as PEFT names them, that are no change of a weight."""

BaseChoice = Literal["original", "dequantized"]


class Difference(NamedTuple):
    """How far the logits of two models are apart."""

    largest: float
    of: float
    """The largest magnitude of the first model's."""

    def __str__(self) -> str:
        return f"{self.largest:.2e} of {self.of:.3g}"

    def within(self, share: float) -> bool:
        """Whether it is below this share of the largest logit; values that are not finite never are."""
        return self.largest <= share * self.of and math.isfinite(self.of)


def export(config: Config, run: Path, folder: Path, out: Path, merge: bool, base: BaseChoice) -> str:
    """Copies the result in `folder` to `out`, an adapter merged into its base model if `merge`. Returns what was done.

    `base`: what an adapter is merged into: the original weights, or what the quantized ones stand for. Raises
    ConfigError where the result cannot be merged, NumbersError where the merged model's logits are not those of base
    and adapter, and StorageError; then nothing is left at `out`.
    """
    if merge:
        _check_mergeable(config, folder, base)
    partial = out.with_name(f"{out.name}.partial")
    try:
        shutil.rmtree(partial, ignore_errors=True)
        if merge:
            partial.mkdir(parents=True)
            said = _merge(config, run, folder, partial, base)
        else:
            shutil.copytree(folder, partial)
            said = "adapter, as peft loads it" if (folder / "adapter_config.json").exists() else _model_note(folder)
        partial.rename(out)
    except OSError as error:
        raise StorageError(f"{out}: cannot be written: {error.strerror or error}") from error
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    return f"{out}: the {said}"


def _model_note(folder: Path) -> str:
    by_code = " with trust_remote_code=True" if _has_bottlenecks(folder) else ""
    return f"model, as transformers loads it{by_code}"


def _has_bottlenecks(folder: Path) -> bool:
    return bottleneck.SETTINGS in json.loads((folder / "config.json").read_text(encoding="utf-8"))


def _check_mergeable(config: Config, folder: Path, base: BaseChoice) -> None:
    """Raises ConfigError where there is nothing to merge, or no weight that could hold what was trained."""
    where = "command line --merge"
    if not (folder / "adapter_config.json").exists():
        if _has_bottlenecks(folder):
            raise ConfigError(
                f"{where}: bottleneck adapters are not linear, so no weight of the base can hold them; export without "
                "--merge: the folder is a whole model, which transformers loads with trust_remote_code=True"
            )
        raise ConfigError(f"{where}: the result is a whole model, so there is no adapter to merge")
    settings = json.loads((folder / "adapter_config.json").read_text(encoding="utf-8"))
    if settings["peft_type"] in PROMPTS:
        raise ConfigError(
            f"{where}: {config.tuning.method} trains vectors in front of the text, which no weight of the base can "
            "hold; export without --merge: peft loads the adapter beside the base model"
        )
    if base == "dequantized" and quantization_of(config.tuning) is None:
        raise ConfigError(
            f"command line --base: {config.tuning.method} does not quantize the base, so there is only the original"
        )
    if base == "original" and isinstance(config.tuning, LoftqConfig):
        raise ConfigError(
            "command line --base: loftq begins as the correction of the 4-bit weights' error, so its adapter does not "
            "fit the original ones; use --base dequantized"
        )


def _merge(config: Config, run: Path, folder: Path, partial: Path, choice: BaseChoice) -> str:
    """Writes the merged model to `partial`; one model is held at a time. Returns what was done."""
    kind, path = config.task.head, config.model.path
    quantization = quantization_of(config.tuning)
    with quiet_libraries():
        tokenizer = load_tokenizer(str(folder), config.task.truncation_side, config.model.trust_remote_code)
        as_trained = None
        # Merged in float32, so that the update is rounded once, and then stored as the base was.
        if choice == "original":
            base, stored = base_model(config, folder, tokenizer, torch.float32)
        else:
            base, stored = base_model(config, folder, tokenizer, torch.float32, quantization)
            dequantize_layers(base.cpu())
        labels = saved_labels(folder)
        task = config.task.make(Parts(tokenizer, base.config, path, labels))
        examples, origin = _examples(run, task, base, writes=not HEADS[kind].is_new)
        logits = _logits_of(task, examples)
        tuned: Any = with_adapter(base, folder).eval()
        beside = logits(tuned)
        _unwrap_heads(tuned)
        merged: Any = tuned.merge_and_unload()
        if isinstance(task, Chat):
            task.stop_at_turns_end(merged)
        exact = _difference(beside, logits(merged))
        _check(exact, TOLERANCES[torch.float32], f"merged into {path}, the adapter does not act as beside it", origin)
        merged.to(stored).save_pretrained(str(partial))
        save_tokenizer(tokenizer, partial)
        if labels:
            shutil.copy(folder / "labels.json", partial)
        del base, tuned, merged
        gc.collect()
        written = _difference(beside, logits(load_model(str(partial), kind, torch.float32).eval()))
        name = str(stored).removeprefix("torch.")
        _check(written, TOLERANCES[stored], f"stored in {name}, the merged model does not act as the tuned one", origin)
        gc.collect()
        if quantization is not None:
            as_trained = _difference(
                logits(load_result(config, folder, tokenizer, DTYPES[config.model.dtype]).eval()), beside
            )
    bits = f"the {quantization.kind} weights" if quantization is not None else "the weights"
    into = path if choice == "original" else f"what {bits} of {path} stand for"
    lines = [
        f"adapter merged into {into}, as transformers loads it",
        f"largest difference from the logits of that base with the adapter beside it, on {origin}:",
        f"  {exact}, merged in float32",
        f"  {written}, as stored in {name}",
    ]
    if as_trained is not None:
        lines.append(f"  {as_trained}, the model as it was trained, on {bits}")
    return "\n".join(lines)


def _unwrap_heads(tuned: nn.Module) -> None:
    """Puts heads that were trained in full in their places; PEFT's merge takes them for single layers but with LoRA."""
    from peft.utils.other import ModulesToSaveWrapper

    for name, module in list(tuned.named_modules()):
        if isinstance(module, ModulesToSaveWrapper):
            outer, _, key = name.rpartition(".")
            setattr(tuned.get_submodule(outer), key, cast(nn.ModuleDict, module.modules_to_save)["default"])


def _check(difference: Difference, tolerance: float, problem: str, origin: str) -> None:
    if not difference.within(tolerance):
        raise NumbersError(
            f"command line --merge: {problem}: on {origin} the logits differ by up to {difference}, more than the "
            f"{tolerance:g} of it that rounding explains. Nothing was written; export without --merge, and load the "
            "adapter beside its base"
        )


def _logits_of(task: Task, examples: Sequence[Tokens]) -> Callable[[nn.Module], list[Tensor]]:
    """A function that gives a model's logits for each example alone, float32 on the CPU."""

    def logits(model: nn.Module) -> list[Tensor]:
        whole = cast(PreTrainedModel, model)
        device, found = next(model.parameters()).device, []
        for example in examples:
            batch: Batch = task.collate([example]).to(device)
            inputs = dict(batch.inputs)
            if not keeps_logits(whole.config):
                inputs.pop("logits_to_keep", None)
            with torch.no_grad():
                output = model(**inputs)
            parts = [output[name] for name in ("logits", "start_logits", "end_logits") if name in output]
            found.append(torch.cat([part.float().flatten() for part in parts]).cpu())
        return found

    return logits


def _difference(first: Sequence[Tensor], second: Sequence[Tensor]) -> Difference:
    pairs = list(zip(first, second, strict=True))
    largest = torch.stack([(one - other).abs().max() for one, other in pairs]).max()
    return Difference(float(largest), float(torch.stack([one.abs().max() for one, _ in pairs]).max()))


def _examples(run: Path, task: Task, model: PreTrainedModel, writes: bool) -> tuple[list[Tokens], str]:
    """A few of the examples that the run was judged on, or random tokens where there are none, and what they are."""
    for file in sorted(run.glob("predictions/step-*.jsonl"), reverse=True):
        lines = [json.loads(line) for line in file.read_text(encoding="utf-8").splitlines()[:EXAMPLES]]
        texts = [
            Text(f"{file}:{n}", line["source"], line["reference"] if writes else "") for n, line in enumerate(lines, 1)
        ]
        if texts:
            encoded = task.encode(texts)
            cut = [
                cast(Tokens, row._replace(source=row.source[:TOKENS], target=row.target[:TOKENS])) for row in encoded
            ]
            return cut, f"{len(cut)} examples of {file.name}"
    rng, vocabulary, half = random.Random(0), model.config.get_text_config().vocab_size, TOKENS // 2
    drawn = [[rng.randrange(vocabulary) for _ in range(TOKENS)] for _ in range(EXAMPLES)]
    targets = [row[half:] if writes else [] for row in drawn]
    examples = [cast(Tokens, Tokens(row[:half], target)) for row, target in zip(drawn, targets, strict=True)]  # pyright: ignore
    return examples, "random tokens"
