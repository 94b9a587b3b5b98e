"""What can be done with a result: judge it, try it. One process, one device."""

from __future__ import annotations

import json
import logging
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import cast

import numpy as np
import torch
from transformers import PreTrainedModel

from shardtune.assemble.evaluators import how_to_write, make_evaluator
from shardtune.assemble.judged import STATISTICS
from shardtune.assemble.loading import load_result
from shardtune.assemble.parts import DTYPES, metric_names, of_tasks, saved_labels
from shardtune.assemble.prepared import evaluated_splits, prepare
from shardtune.assemble.quiet import quiet_libraries
from shardtune.comparing import compare
from shardtune.config import Config
from shardtune.data.corpus import Corpus
from shardtune.errors import ConfigError
from shardtune.examples import Text, Tokens
from shardtune.metrics import Scorer
from shardtune.model.skeleton import load_architecture
from shardtune.model.tokenizer import load_tokenizer
from shardtune.strategy.replicated import Replicated
from shardtune.task.section import Parts
from shardtune.text_table import table
from shardtune.world import join_world

log = logging.getLogger("shardtune")

GENERATED_AT_ONCE = 8


def evaluate(config: Config, corpus: Corpus, folder: Path, split_name: str, label: str) -> str:
    """Judges the result in `folder` on a split; returns the table of scores.

    Predictions and statistics go to the run's folder as <label>-<split>, beside those of the run.
    """
    if not folder.is_dir():
        raise ConfigError(f"{folder}: there is no result to evaluate; train first, or name one with --checkpoint")
    _check_fits(config, folder)
    world = join_world()
    with quiet_libraries():
        prepared = prepare(config, world, corpus, folder)
        found = [s for s in evaluated_splits(prepared, config.evaluation.examples) if s.name == split_name]
        if not found:
            raise ConfigError(f"data.{split_name}: the {split_name} split has no examples")
        strategy = Replicated(world, DTYPES[config.model.dtype])
        strategy.adopt(load_result(config, folder, prepared.tokenizer, DTYPES[config.model.dtype]))
        evaluator = make_evaluator(
            config, of_tasks(config, prepared.task), strategy, world, prepared.labels,
            Path(config.runs) / config.name, told_to_stop=lambda: None,
        )  # fmt: skip
        judged = evaluator.run(label, found[0], lambda examples: None)
        assert judged is not None  # nobody told it to stop
    world.close()
    statistics = np.load(Path(config.runs) / config.name / STATISTICS / f"{label}-{split_name}.npy")
    scorer = Scorer(metric_names(config), prepared.labels)
    scores = compare(scorer, {label: statistics}, label, seed=config.seed)["variants"][label]
    rows = [
        [split_name, key, f"{value['value']:.4f}", f"{value['low']:.4f} to {value['high']:.4f}"]
        for key, value in scores.items()
    ]
    count = found[0].examples
    shown = table(rows, ["split", "metric", "value", "95 % interval"])
    return f"{count:,} example{'s' * (count != 1)} of {split_name}\n{shown}"


def _check_fits(config: Config, folder: Path) -> None:
    """Raises ConfigError where the result in `folder` is that of another task."""
    if (folder / "config.json").exists():
        load_architecture(str(folder), config.task.head, config.model.trust_remote_code)
    is_classifier, wants_classifier = bool(saved_labels(folder)), config.task.fields.labels_of is not None
    if is_classifier != wants_classifier:
        kinds = {True: "a classifier", False: "no classifier"}
        raise ConfigError(
            f"{folder}: holds {kinds[is_classifier]}, but task.kind is {config.task.kind}; "
            "give the config that it was trained with"
        )


def generate(config: Config, folder: Path, sources: Sequence[str], as_json: bool) -> Iterator[str]:
    """What the model in a result's folder writes for each source: as it is, or as JSON lines with source and
    prediction."""
    with quiet_libraries():
        tokenizer = load_tokenizer(str(folder), config.task.truncation_side, config.model.trust_remote_code)
        model = load_result(config, folder, tokenizer, DTYPES[config.model.dtype])
        device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        model.to(device).eval()
        labels = saved_labels(folder)
        base = cast(PreTrainedModel, model)
        task = of_tasks(config, config.task.make(Parts(tokenizer, base.config, config.model.path, labels)))
        how = how_to_write(config)
        for start in range(0, len(sources), GENERATED_AT_ONCE):
            some = sources[start : start + GENERATED_AT_ONCE]
            given = [Text("command line", source, "") for source in some]
            encoded = task.encode(given)
            for number, row in enumerate(encoded, start + 1):
                if row.source_cut:
                    limit = config.task.max_source_tokens
                    log.warning(f"text {number} of {len(sources)} was cut to task.max_source_tokens ({limit}) tokens")
            examples = [
                Tokens(np.array(e.source), np.array(e.target), number=number) for number, e in enumerate(encoded, start)
            ]
            with torch.no_grad():
                written = task.as_written(given, task.predict(model, examples, how))
            for source, prediction in zip(some, written, strict=True):
                line = {"source": source, "prediction": prediction}
                yield json.dumps(line, ensure_ascii=False) if as_json else prediction
