"""The command line. Under `--help`, and for a wrong flag or a bad config, torch is not imported."""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import shardtune
from shardtune import checkpoint_commands, commands
from shardtune.commands import config_of
from shardtune.errors import ConfigError, RankError
from shardtune.exit_codes import guarded, leave

if TYPE_CHECKING:
    from shardtune.config import Config
    from shardtune.stopping import Stopping


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
    choices = parser.add_subparsers(title="commands", metavar="COMMAND", required=True, parser_class=Parser)

    train = choices.add_parser("train", help="train from a config file; spawns the ranks itself")
    _add_config(train)
    train.add_argument("--ranks", type=int, metavar="N", help="ranks on this machine (default: its GPUs, or 1)")
    train.add_argument("--nodes", type=int, default=1, metavar="N", help="machines that run this same command")
    train.add_argument("--node-rank", type=int, default=0, metavar="K", help="which of them this is, from 0")
    train.add_argument("--rendezvous", metavar="HOST:PORT", help="where node 0 is reached, with several nodes")
    train.set_defaults(run=_train, command=train)

    resume = choices.add_parser("resume", help="go on from the newest good checkpoint of a run")
    resume.add_argument("--run", type=Path, required=True, metavar="DIR", dest="folder", help="the run's folder")
    resume.add_argument("--ranks", type=int, metavar="N", help="ranks on this machine (default: as many as it had)")
    resume.add_argument("overrides", nargs="*", metavar="key.path=value", help="in place of what its config says")
    resume.set_defaults(run=_resume, command=resume, nodes=1, node_rank=0, rendezvous=None)

    evaluate = choices.add_parser("evaluate", help="judge a tuned model on a split")
    _add_config(evaluate)
    evaluate.add_argument(
        "--checkpoint", type=Path, metavar="PATH", help="a result's folder, or a checkpoint (default: the run's final)"
    )
    evaluate.add_argument("--split", choices=["validation", "test"], default="test", help="default: test")
    evaluate.set_defaults(run=commands.evaluate, command=evaluate)

    generate = choices.add_parser("generate", help="try the tuned model")
    generate.add_argument("--run", type=Path, required=True, metavar="DIR", dest="folder", help="the run's folder")
    _add_step(generate)
    generate.add_argument("--input", type=Path, metavar="FILE.jsonl", help="rows with the fields of the training data")
    generate.add_argument("text", nargs="?", metavar="TEXT", help="one source text, or a user's turn")
    generate.set_defaults(run=commands.generate, command=generate)

    export = choices.add_parser("export", help="write the result as a Hugging Face folder")
    export.add_argument("--run", type=Path, required=True, metavar="DIR", dest="folder", help="the run's folder")
    _add_step(export)
    export.add_argument("--out", type=Path, required=True, metavar="DIR", help="a folder that does not exist yet")
    export.add_argument("--merge", action="store_true", help="merge an adapter into its base model")
    export.add_argument(
        "--base", choices=["original", "dequantized"],
        help="with --merge: into the base's own weights (default), or into what the quantized ones stand for",
    )  # fmt: skip
    export.set_defaults(run=commands.export, command=export)

    watch = choices.add_parser("watch", help="a run's figures as they come, also of a run on another machine")
    watch.add_argument("--run", type=Path, required=True, metavar="DIR", dest="folder", help="the run's folder")
    watch.add_argument("--once", action="store_true", help="print how it is now, and no more")
    watch.set_defaults(run=commands.watch, command=watch)

    whole = choices.add_parser("verify", help="read every byte of a checkpoint: is it whole?")
    whole.add_argument("--checkpoint", type=Path, required=True, metavar="DIR", help="RUN/checkpoints/step-…")
    whole.set_defaults(run=checkpoint_commands.verify, command=whole)

    kept = choices.add_parser("checkpoints", help="the checkpoints of a run, and which of them are whole")
    kept.add_argument("--run", type=Path, required=True, metavar="DIR", dest="folder", help="the run's folder")
    kept.set_defaults(run=checkpoint_commands.checkpoints, command=kept)

    verify = choices.add_parser("verify-layout", help="prove that ranks, micro-batches and batching change nothing")
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
    verify.set_defaults(run=commands.verify_layout, command=verify)

    prepare = choices.add_parser("prepare", help="read, check and tokenize the data before a run, and describe it")
    _add_config(prepare)
    prepare.add_argument("--ranks", type=int, default=1, metavar="N", help="ranks to tell the padding of (default: 1)")
    prepare.set_defaults(run=commands.prepare, command=prepare)

    report = choices.add_parser("report", help="write the page of a run anew, or one that compares runs")
    report.add_argument(
        "--run", type=Path, required=True, action="append", metavar="DIR", dest="folders",
        help="a run's folder; of several, the first is what the others are compared with",
    )  # fmt: skip
    report.add_argument(
        "--out", type=Path, metavar="FILE", help="default: DIR/report.html, or ./comparison.html of several runs"
    )
    report.set_defaults(run=commands.report, command=report)

    doctor = choices.add_parser("doctor", help="what this machine can run, and what is missing")
    doctor.set_defaults(run=commands.doctor)
    return parser


def _add_config(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--config", type=Path, required=True, metavar="FILE", help="the run's YAML file")
    parser.add_argument("overrides", nargs="*", metavar="key.path=value", help="in place of what the file says")


def _add_step(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--step", type=int, metavar="N", help="of a checkpoint, in place of the result")


def _train(options: argparse.Namespace) -> int:
    from shardtune.world import launched_ranks

    if launched_ranks() is not None:  # started by torchrun: this is a rank already
        return _train_here(options)
    config = config_of(options)
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
    from shardtune.run_folder import check_place
    from shardtune.spawn import spawn

    _check_outside(config)
    check_model_path(config)
    check_place(Path(config.runs) / config.name)
    command = [sys.executable, "-m", "shardtune.cli", "--config", str(options.config), *options.overrides]
    try:
        return spawn(command, ranks, options.nodes, options.node_rank, options.rendezvous)
    except RankError as error:
        from shardtune.assemble.run_again import what_is_kept

        raise RankError(f"{error}\n{what_is_kept(config)}") from None


def _resume(options: argparse.Namespace) -> int:
    from shardtune.assemble.run_again import to_resume
    from shardtune.run_folder import go_where_started

    folder = options.folder.absolute()
    options.config, options.overrides, options.ranks = to_resume(
        folder, options.overrides, options.ranks, _visible_gpus()
    )
    go_where_started(folder)
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
    from shardtune.run_folder import check_place
    from shardtune.world import check_launcher, join_world, launched_rank, launched_ranks

    config = config or config_of(options)
    check_launcher()
    ranks, rank = launched_ranks() or 1, launched_rank()
    _check_ranks(config, ranks)
    _check_outside(config)
    check_model_path(config)
    said = finished(config)
    if said is not None:
        if rank == 0:
            print("\n".join(said))
        return 0
    corpus = None
    if ranks == 1:
        check_place(Path(config.runs) / config.name)
        corpus = read_texts(config)
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


def _check_outside(config: Config) -> None:
    """Whether what the config names beside its files can be used, before anything slow begins."""
    from shardtune.assemble.trackers import check_trackers
    from shardtune.metrics import check_own

    check_trackers(config)
    check_own(config.evaluation.metrics or [])


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


if __name__ == "__main__":
    leave(train_as_rank(sys.argv[1:]))  # a rank that `shardtune train` spawned
