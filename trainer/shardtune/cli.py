"""The command line. Under `--help`, and for a wrong flag or a bad config, torch is not imported."""

from __future__ import annotations

import argparse
import functools
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import shardtune
from shardtune.errors import ConfigError
from shardtune.exit_codes import guarded, leave

if TYPE_CHECKING:
    from shardtune.config import Config
    from shardtune.stopping import Stopping

STRATEGIES = ("auto", "single", "ddp", "fsdp2", "zero1", "zero2", "zero3")


class Parser(argparse.ArgumentParser):
    """Says what is wrong in one line, and exits with the code for a wrong command line."""

    def error(self, message: str) -> NoReturn:
        """Prints the message and the usage, and exits with code 2."""
        self.exit(ConfigError.exit_code, f"shardtune: {message}\n{self.format_usage()}")

    def parse(self, arguments: Sequence[str]) -> argparse.Namespace:
        """The options; overrides may stand anywhere among them."""
        options, unknown = self.parse_known_args(arguments)
        command: Parser = getattr(options, "command", self)
        if hasattr(options, "overrides"):
            options.overrides += [word for word in unknown if _is_override(word)]
            unknown = [word for word in unknown if not _is_override(word)]
            if any(word.startswith("--") for word in unknown):
                command.error(
                    f"{unknown[0]}: unknown option; keys of the config are given as key.path=value, no dashes"
                )
        if unknown:
            command.error(f"{unknown[0]}: unknown")
        return options


def _is_override(word: str) -> bool:
    return not word.startswith("-") and "=" in word


def main(arguments: Sequence[str] | None = None) -> int:
    """The console script `shardtune`. Returns the exit code."""
    options = _parser().parse(sys.argv[1:] if arguments is None else arguments)
    return guarded(lambda: options.run(options))


def train_as_rank(arguments: Sequence[str]) -> int:
    """`launch/train.py`: one rank of those that a launcher started, or the only one. Returns the exit code."""
    parser = Parser(prog="train.py", description="Train from a config file: one rank of a run.")
    _add_config(parser)
    parser.add_argument("--local_rank", "--local-rank", type=int, help=argparse.SUPPRESS)  # deepspeed appends it
    options = parser.parse(arguments)
    return guarded(lambda: _train_here(options))


def _parser() -> Parser:
    parser = Parser(
        prog="shardtune",
        description="Fine-tune encoder-decoders, decoders and encoders from one config file, on one device or many.",
    )
    parser.add_argument("--version", action="version", version=f"shardtune {shardtune.__version__}")
    commands = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    train = commands.add_parser("train", help="train from a config file; spawns the ranks itself")
    _add_config(train)
    train.add_argument("--ranks", type=int, metavar="N", help="ranks on this machine (default: its GPUs, or 1)")
    train.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that run this same command")
    train.add_argument("--node-rank", type=int, default=0, metavar="K", help="which of them this is, from 0")
    train.add_argument("--rendezvous", metavar="HOST:PORT", help="where node 0 is reached, with several nodes")
    train.set_defaults(run=_train, command=train)

    resume = commands.add_parser("resume", help="go on from the newest good checkpoint of a run")
    resume.add_argument("--run", type=Path, required=True, metavar="DIR", dest="folder", help="the run's folder")
    resume.add_argument("--ranks", type=int, metavar="N", help="ranks on this machine (default: as many as it had)")
    resume.add_argument("overrides", nargs="*", metavar="key.path=value", help="in place of what its config says")
    resume.set_defaults(run=_resume, command=resume, nodes=1, node_rank=0, rendezvous=None)

    evaluate = commands.add_parser("evaluate", help="judge a tuned model on a split")
    _add_config(evaluate)
    evaluate.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="a result's folder, or a checkpoint (default: the run's final)"
    )
    evaluate.add_argument("--split", choices=["validation", "test"], default="test", help="default: test")
    evaluate.set_defaults(run=_evaluate, command=evaluate)

    generate = commands.add_parser("generate", help="try the tuned model")
    generate.add_argument("--run", type=Path, required=True, metavar="DIR", dest="folder", help="the run's folder")
    _add_step(generate)
    generate.add_argument("--input", type=Path, metavar="FILE.jsonl", help="rows with the fields of the training data")
    generate.add_argument("text", nargs="?", metavar="TEXT", help="one source text, or a user's turn")
    generate.set_defaults(run=_generate, command=generate)

    export = commands.add_parser("export", help="write the result as a Hugging Face folder")
    export.add_argument("--run", type=Path, required=True, metavar="DIR", dest="folder", help="the run's folder")
    _add_step(export)
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    export.add_argument("--merge", action="store_true", help="merge an adapter into its base model")
    export.add_argument(
        "--base", choices=["original", "dequantized"],
        help="with --merge: into the base's own weights (default), or into what the quantized ones stand for",
    )  # fmt: skip
    export.set_defaults(run=_export, command=export)

    whole = commands.add_parser("verify", help="read every byte of a checkpoint: is it whole?")
    whole.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="RUN/checkpoints/step-…")
    whole.set_defaults(run=_verify, command=whole)

    kept = commands.add_parser("checkpoints", help="the checkpoints of a run, and which of them are whole")
    kept.add_argument("--run", type=Path, required=True, metavar="DIR", dest="folder", help="the run's folder")
    kept.set_defaults(run=_checkpoints, command=kept)

    verify = commands.add_parser("verify-layout", help="prove that ranks, micro-batches and batching change nothing")
    _add_config(verify)
    verify.add_argument("--ranks", default="1,2", metavar="N,…", help="rank counts (default: 1,2)")
    verify.add_argument("--strategies", metavar="KIND,…", help="of strategy.kind (default: the config's, or auto)")
    verify.add_argument("--batchings", metavar="KIND,…", help="of data.batching (default: all that fit the task)")
    verify.add_argument(
        "--micro-batches", default="1,3", metavar="N,…", help="of a rank and step; each: of one example (default: 1,3)"
    )
    verify.add_argument("--steps", default="10", metavar="N", help="optimizer steps (default: 10)")
    verify.add_argument(
        "--tolerance", type=float, default=1e-5, metavar="X", help="what counts as equal (default: 1e-5)"
    )
    verify.set_defaults(run=_verify_layout, command=verify)

    prepare = commands.add_parser("prepare", help="read, check and tokenize the data before a run, and describe it")
    _add_config(prepare)
    prepare.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks to tell the padding of (default: 1)")
    prepare.set_defaults(run=_prepare, command=prepare)

    doctor = commands.add_parser("doctor", help="what this machine can run, and what is missing")
    doctor.set_defaults(run=_doctor)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="in place of what the file says")


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, metavar="N", help="of a checkpoint, in place of the result")


def _config(options: argparse.Namespace) -> Config:
    from shardtune.config_file import load_config

    return load_config(options.config, options.overrides)


def _train(options: argparse.Namespace) -> int:
    from shardtune.world import launched_ranks

    if launched_ranks() is not None:  # started by torchrun: this is a rank already
        return _train_here(options)
    config = _config(options)
    ranks = options.ranks
    if ranks is None:
        ranks = 1 if config.strategy.kind == "single" and options.nodes == 1 else max(1, _visible_gpus())
    for name, value in (("--ranks", ranks), ("--nodes", options.nodes)):
        if value < 1:
            raise ConfigError(f"command line {name}: {value} is not 1 or more")
    if not 0 <= options.node_rank < options.nodes:
        raise ConfigError(
            f"command line --node-rank: {options.node_rank} is not in 0 to {options.nodes - 1}, below --nodes"
        )
    if options.nodes > 1 and options.rendezvous is None:
        raise ConfigError("command line --rendezvous: several nodes need HOST:PORT of node 0")
    _check_ranks(config, ranks * options.nodes)
    if ranks * options.nodes == 1:
        return _train_here(options, config)
    from shardtune.assemble.data import check_model_path
    from shardtune.spawn import spawn

    check_model_path(config)
    command = [sys.executable, "-m", "shardtune.cli", "--config", str(options.config), *options.overrides]
    return spawn(command, ranks, options.nodes, options.node_rank, options.rendezvous)


def _resume(options: argparse.Namespace) -> int:
    from shardtune.assemble.run_again import to_resume

    options.config, options.overrides, options.ranks = to_resume(
        options.folder, options.overrides, options.ranks, _visible_gpus()
    )
    return _train(options)


def _train_here(options: argparse.Namespace, config: Config | None = None) -> int:
    """One rank, in this process."""
    from shardtune.stopping import Stopping

    with Stopping() as stopping:
        return _train_until(options, config, stopping)


def _train_until(options: argparse.Namespace, config: Config | None, stopping: Stopping) -> int:
    from shardtune.assemble.data import check_model_path, read_texts
    from shardtune.assemble.run_again import finished
    from shardtune.config_file import places
    from shardtune.world import check_launcher, join_world, launched_rank, launched_ranks

    config = config or _config(options)
    check_launcher()
    ranks, rank = launched_ranks() or 1, launched_rank()
    _check_ranks(config, ranks)
    check_model_path(config)
    said = finished(config)
    if said is not None:
        if rank == 0:
            print("\n".join(said))
        return 0
    corpus = read_texts(config) if ranks == 1 else None
    world = join_world()
    with world.others_may_end():
        if ranks > 1:
            # After joining, so that all ranks leave with the same code if the data is wrong.
            read: list[Any] = []
            world.first_does("texts", lambda: read.append(read_texts(config)))
            corpus = read[0] if read else None
        from shardtune.assemble.quiet import quiet_libraries
        from shardtune.assemble.resuming import begin_at
        from shardtune.assemble.run import train_run

        place = places(options.config, options.overrides)
        beginning = begin_at(config, world, lambda text: print(text, file=sys.stderr), place)
        try:
            with quiet_libraries():
                last_words = train_run(config, world, corpus, sys.argv, stopping, beginning)
        finally:
            beginning.release()
        if world.is_first:
            print(last_words, flush=True)
    world.close()  # not after an error: it would wait for collectives that will never end
    return 0


def _check_ranks(config: Config, ranks: int) -> None:
    if config.strategy.kind == "single" and ranks > 1:
        raise ConfigError(
            f"strategy.kind: single cannot use {ranks} ranks; start one process, or use ddp, fsdp2, zero1, zero2, zero3"
        )


def _visible_gpus() -> int:
    """How many GPUs this process may use, without importing torch."""
    chosen = os.environ.get("CUDA_VISIBLE_DEVICES")
    if chosen is not None:
        return len([device for device in chosen.split(",") if device.strip() not in ("", "-1")])
    return len(list(Path("/dev").glob("nvidia[0-9]*")))


def _evaluate(options: argparse.Namespace) -> int:
    config = _config(options)
    from shardtune.assemble.data import read_texts

    corpus = read_texts(config)
    from shardtune.assemble.of_step import as_result
    from shardtune.assemble.trained import evaluate

    run = Path(config.runs) / config.name
    with as_result(config, options.checkpoint or run / "final", run / "evaluated") as (folder, label):
        print(evaluate(config, corpus, folder, options.split, label))
    return 0


def _prepare(options: argparse.Namespace) -> int:
    config = _config(options)
    if options.ranks < 1:
        raise ConfigError(f"command line --ranks: {options.ranks} is not 1 or more")
    from shardtune.assemble.data import check_model_path, read_texts

    check_model_path(config)
    corpus = read_texts(config)
    from shardtune.assemble.prepare import prepare_data

    print(prepare_data(config, corpus, options.ranks))
    return 0


def _generate(options: argparse.Namespace) -> int:
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


def _export(options: argparse.Namespace) -> int:
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


def _of_run(options: argparse.Namespace) -> tuple[Config, Path]:
    """The run's config, and where its result is: `final`, or the checkpoint of `--step`."""
    from shardtune.checkpoint_commands import checkpoint_of
    from shardtune.config_file import load_config

    folder: Path = options.folder
    if not (folder / "config.yaml").is_file():
        raise ConfigError(f"command line --run: {folder} is no run's folder (no config.yaml)")
    config = load_config(folder / "config.yaml", [])
    if options.step is not None:
        return config, checkpoint_of(folder, options.step)
    if not (folder / "final").is_dir():
        raise ConfigError(
            f"command line --run: {folder} has no final/; the run has not come to its end. --step N takes one of its "
            "checkpoints"
        )
    return config, folder / "final"


def _verify(options: argparse.Namespace) -> int:
    from shardtune.checkpoint_commands import verify

    return verify(options)


def _checkpoints(options: argparse.Namespace) -> int:
    from shardtune.checkpoint_commands import checkpoints

    return checkpoints(options)


def _verify_layout(options: argparse.Namespace) -> int:
    from shardtune.assemble.data import check_model_path, read_texts
    from shardtune.assemble.layouts import layouts, verify

    config = _config(options)
    check_model_path(config)
    read_texts(config)  # what is wrong is said once, before any process starts
    can_pack = config.task.kind != "classification" and config.model.attention not in ("eager", "flex_attention")
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


def _doctor(options: argparse.Namespace) -> int:
    from shardtune.doctor import examine

    print(examine())
    return 0


if __name__ == "__main__":
    leave(train_as_rank(sys.argv[1:]))  # a rank that `shardtune train` spawned
