"""The commands beside training; cli.py has their options. What they need is imported when they run."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING

from shardtune.errors import ConfigError

if TYPE_CHECKING:
    from shardtune.config import Config

STRATEGIES = ("auto", "single", "ddp", "fsdp2", "zero1", "zero2", "zero3")


def config_of(options: argparse.Namespace) -> Config:
    """That of `--config` and the overrides. Raises ConfigError."""
    from shardtune.config_file import load_config

    return load_config(options.config, options.overrides)


def evaluate(options: argparse.Namespace) -> int:
    """`shardtune evaluate`. Returns the exit code; raises ShardtuneError."""
    config = config_of(options)
    from shardtune.assemble.data import read_texts

    corpus = read_texts(config)
    from shardtune.assemble.of_step import as_result
    from shardtune.assemble.trained import evaluate

    run = Path(config.runs) / config.name
    with as_result(config, options.checkpoint or run / "final", run / "evaluated") as (folder, label):
        print(evaluate(config, corpus, folder, options.split, label))
    return 0


def prepare(options: argparse.Namespace) -> int:
    """`shardtune prepare`. Returns the exit code; raises ShardtuneError."""
    config = config_of(options)
    if options.ranks < 1:
        raise ConfigError(f"command line --ranks: {options.ranks} is not 1 or more")
    from shardtune.assemble.data import check_model_path, read_texts

    check_model_path(config)
    corpus = read_texts(config)
    from shardtune.assemble.prepare import prepare_data

    print(prepare_data(config, corpus, options.ranks))
    return 0


def generate(options: argparse.Namespace) -> int:
    """`shardtune generate`. Returns the exit code; raises ShardtuneError."""
    if (options.text is None) == (options.input is None):
        problem = "neither is" if options.text is None else "both are"
        raise ConfigError(f"command line: give a TEXT or --input FILE.jsonl; {problem} given")
    config, result = _of_run(options)
    from shardtune.assemble.data import read_sources, source_of

    sources = [source_of(config, options.text)] if options.text is not None else read_sources(config, options.input)
    from shardtune.assemble.of_step import as_result
    from shardtune.assemble.trained import generate

    with as_result(config, result, options.folder / "tried") as (folder, _):
        for line in generate(config, folder, sources, as_json=options.input is not None):
            print(line, flush=True)
    return 0


def report(options: argparse.Namespace) -> int:
    """`shardtune report`. Returns the exit code; raises ShardtuneError. torch is imported only to test several runs."""
    from shardtune.report import REPORT
    from shardtune.report.files import read_run
    from shardtune.run_folder import write_whole

    runs = [read_run(folder) for folder in options.folders]
    out: Path = options.out or (options.folders[0] / REPORT if len(runs) == 1 else Path("comparison.html"))
    if out.is_dir():
        raise ConfigError(f"command line --out: {out} is a folder; name a file, such as {out / REPORT}")
    if len(runs) == 1:
        from shardtune.report.page import page

        write_whole(out, page(runs[0]))
    else:
        from shardtune.report.several import comparison_page, judged_alike

        pairs, notes = {}, []
        if any(judged_alike(runs[0], other) for other in runs[1:]):
            from shardtune.assemble.paired_runs import paired_runs

            pairs, notes = paired_runs(runs)
        write_whole(out, comparison_page(runs, pairs, notes))
    print(f"written: {out}")
    return 0


def export(options: argparse.Namespace) -> int:
    """`shardtune export`. Returns the exit code; raises ShardtuneError."""
    if options.out.exists():
        raise ConfigError(f"command line --out: {options.out} is there already; name a new folder")
    if options.base is not None and not options.merge:
        raise ConfigError("command line --base: only with --merge")
    config, result = _of_run(options)
    from shardtune.assemble.export import export
    from shardtune.assemble.of_step import as_result

    with as_result(config, result, options.out) as (folder, _):
        print(export(config, options.folder, folder, options.out, options.merge, options.base or "original"))
    return 0


def verify_layout(options: argparse.Namespace) -> int:
    """`shardtune verify-layout`. Returns the exit code; raises ShardtuneError."""
    from shardtune.assemble.data import check_model_path, read_texts
    from shardtune.assemble.layouts import layouts, verify

    config = config_of(options)
    check_model_path(config)
    read_texts(config)  # what is wrong is said once, before any process starts
    can_pack = config.task.packs and config.model.attention not in ("eager", "flex_attention")
    fitting = ["padded", "grouped", *(["packed"] if can_pack else [])]
    chosen = layouts(
        [_number("--ranks", word) for word in options.ranks.split(",")],
        _among("--strategies", options.strategies, [config.strategy.kind], STRATEGIES),
        _among("--batchings", options.batchings, fitting, ["padded", "grouped", "packed"]),
        [None if word == "each" else _number("--micro-batches", word) for word in options.micro_batches.split(",")],
    )
    if not chosen:
        raise ConfigError("command line: strategy single works on one rank only, so no layout is left")
    if len(chosen) == 1:
        raise ConfigError("command line: a single layout has nothing to be compared with; give more of them")
    with tempfile.TemporaryDirectory(prefix="shardtune-layouts-") as folder:
        print(
            verify(
                config,
                chosen,
                _number("--steps", options.steps),
                options.tolerance,
                Path(folder),
                functools.partial(print, flush=True),
            )
        )
    return 0


def watch(options: argparse.Namespace) -> int:
    """`shardtune watch`. Returns the exit code; raises ShardtuneError."""
    from shardtune.watching.watch import watch

    try:
        watch(options.folder.absolute(), options.once)
    except KeyboardInterrupt:
        print()
    except BrokenPipeError:  # whoever reads has seen enough; nothing is left for Python to write at its end
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
    return 0


def doctor(options: argparse.Namespace) -> int:
    """`shardtune doctor`. Returns the exit code; raises ShardtuneError."""
    from shardtune.doctor import examine

    print(examine())
    return 0


def _of_run(options: argparse.Namespace) -> tuple[Config, Path]:
    """The run's config, and where its result is: `final`, or the checkpoint of `--step`."""
    from shardtune.checkpoint_commands import checkpoint_of
    from shardtune.config_file import load_config
    from shardtune.run_folder import go_where_started

    folder = options.folder = options.folder.absolute()
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"command line --run: {folder} is no run's folder (no config.yaml)")
    config = load_config(folder / "config.yaml", [])
    for option in ("input", "out"):
        if getattr(options, option, None) is not None:
            setattr(options, option, getattr(options, option).absolute())
    go_where_started(folder)
    if options.step is not None:
        return config, checkpoint_of(folder, options.step)
    if not (folder / "final").is_dir():
        raise ConfigError(
            f"command line --run: {folder} has no final/; the run has not come to its end. --step N takes one of its "
            "checkpoints"
        )
    return config, folder / "final"


def _number(option: str, word: str) -> int:
    if not (word.isascii() and word.isdigit() and int(word) > 0):
        raise ConfigError(f"command line {option}: {word!r} is not a whole number from 1 on")
    return int(word)


def _among(option: str, given: str | None, default: list[str], allowed: Sequence[str]) -> list[str]:
    names = given.split(",") if given else default
    for name in names:
        if name not in allowed:
            raise ConfigError(f"command line {option}: {name!r} is not one of {', '.join(allowed)}")
    return names
