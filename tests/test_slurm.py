"""slurm/train.sbatch on a real cluster of two nodes."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers import AutoModelForSeq2SeqLM, AutoTokenizer

import slurm_cluster
from launching import wait_for
from slurm_cluster import SlurmCluster
from tiny import tiny_config

REPOSITORY = Path(__file__).resolve().parent.parent

WHY_NOT = slurm_cluster.why_not()
pytestmark = pytest.mark.skipif(WHY_NOT is not None, reason=f"no Slurm: {WHY_NOT}")


@pytest.fixture(scope="module")
def cluster(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SlurmCluster]:
    with slurm_cluster.slurm_cluster(tmp_path_factory.mktemp("slurm")) as cluster:
        yield cluster


def submit_and_wait(
    cluster: SlurmCluster, output: Path, *arguments: str | Path, sbatch: tuple[str, ...] = ("-N", "2")
) -> tuple[str, int, str]:
    """Run slurm/train.sbatch to its end: the job's state, its exit code and what it printed."""
    number = cluster.submit(
        *sbatch, f"--output={output}", "slurm/train.sbatch", *arguments,
        cwd=REPOSITORY, environment={"SHARDTUNE_VENV": sys.prefix, "SHARDTUNE_CACHE": str(output.parent / "cache")},
    )  # fmt: skip
    state, code = cluster.wait(number)
    return state, code, output.read_text() if output.exists() else cluster.logs()


def test_trains_on_two_nodes(cluster: SlurmCluster, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    arguments = ("--config", config, "name=two-nodes")
    state, code, printed = submit_and_wait(cluster, tmp_path / "job.out", *arguments)
    assert (state, code) == ("COMPLETED", 0), printed

    run = tmp_path / "runs" / "two-nodes"
    environment = json.loads((run / "environment.json").read_text())
    assert (environment["ranks"], environment["strategy"]) == (2, "ddp")
    assert [json.loads(line)["step"] for line in (run / "metrics.jsonl").read_text().splitlines()] == [1, 2, 3, 4, 4]
    model = AutoModelForSeq2SeqLM.from_pretrained(run / "final")
    tokenizer = AutoTokenizer.from_pretrained(run / "final")
    assert model.generate(**tokenizer("a red cat", return_tensors="pt"), max_new_tokens=4).shape[0] == 1


def test_exit_code_of_the_ranks_is_that_of_the_job(cluster: SlurmCluster, tmp_path: Path) -> None:
    config = tiny_config(tmp_path)
    state, code, printed = submit_and_wait(cluster, tmp_path / "job.out", "--config", config, "no_such_key=1")
    assert (state, code) == ("FAILED", 2), printed
    assert "no_such_key" in printed


@pytest.mark.parametrize("how", [["--signal=TERM"], ["--signal=USR1", "--batch"]], ids=" ".join)
def test_told_to_stop(how: list[str], cluster: SlurmCluster, tmp_path: Path) -> None:
    config, output = tiny_config(tmp_path, duration__steps=1000), tmp_path / "job.out"
    number = cluster.submit(
        "-N", "2", f"--output={output}", "slurm/train.sbatch", "--config", config,
        cwd=REPOSITORY, environment={"SHARDTUNE_VENV": sys.prefix, "SHARDTUNE_CACHE": str(tmp_path / "cache")},
    )  # fmt: skip
    metrics = tmp_path / "runs" / "tiny" / "metrics.jsonl"
    assert wait_for(lambda: metrics.exists() and metrics.read_text().count("\n") >= 5, 120), output.read_text()
    cluster.command("scancel", *how, str(number))
    assert cluster.wait(number) == ("FAILED", 75), output.read_text()
    step = json.loads(metrics.read_text().splitlines()[-1])["step"]
    assert [path.name for path in (tmp_path / "runs" / "tiny" / "checkpoints").iterdir()] == [f"step-{step:08}"]
    assert output.read_text().count("shardtune: stopped (exit code 75)\n") == 1


def test_says_where_the_environment_is_missing(cluster: SlurmCluster, tmp_path: Path) -> None:
    number = cluster.submit(
        f"--output={tmp_path / 'job.out'}", "slurm/train.sbatch", "--config", "none.yaml",
        cwd=REPOSITORY, environment={"SHARDTUNE_VENV": str(tmp_path / "nowhere")},
    )  # fmt: skip
    assert cluster.wait(number) == ("FAILED", 2)
    assert "make setup" in (tmp_path / "job.out").read_text()
