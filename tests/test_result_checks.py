"""What is not whole is not saved: the checks alone, and a run whose parts get lost on the way to its file."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any, cast

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

import tiny
from shardtune import cli
from shardtune.errors import NumbersError
from shardtune.result_checks import check_changes, check_finite, whole
from shardtune.strategy.replicated import Replicated


class Start:
    """What tensors began as."""

    def __init__(self, **tensors: Tensor) -> None:
        self.tensors = tensors

    def read(self, name: str, start: int, stop: int) -> Tensor:
        return self.tensors[name].flatten()[start:stop]

    def dtype(self, name: str) -> torch.dtype:
        return torch.float32


def gathered(tensors: dict[str, Tensor], held: dict[str, int] | None = None) -> dict[str, Tensor]:
    shapes = {"a": torch.Size((4, 50)), "b": torch.Size((3,))}
    return dict(whole(tensors.items(), shapes, held or {"a": 200, "b": 0}))


GOOD = {"a": torch.ones(4, 50), "b": torch.zeros(3)}
HALF = torch.cat([torch.ones(2, 50), torch.zeros(2, 50)])


def test_whole_tensors() -> None:
    assert gathered(GOOD).keys() == GOOD.keys()
    nearly = torch.ones(4, 50)
    nearly[0, 0] = 0  # an average that happens to be zero
    gathered({**GOOD, "a": nearly})


@pytest.mark.parametrize(
    ("tensors", "said"),
    [
        ({**GOOD, "a": torch.ones(2, 50)}, r"a has shape \[2, 50\], not \[4, 50\]"),
        ({**GOOD, "a": torch.ones(0)}, r"a has shape \[0\]"),
        ({"a": GOOD["a"]}, "1 trained tensors are missing, such as b"),
        ({**GOOD, "b": torch.tensor([0.0, float("nan"), float("inf")])}, "2 of the 3 values of b are not finite"),
        ({**GOOD, "a": HALF}, "100 of the 200 values of a that the ranks hold are zero in it"),
    ],
)
def test_what_is_not_whole(tensors: dict[str, Tensor], said: str) -> None:
    with pytest.raises(NumbersError, match=said):
        gathered(tensors)


def test_an_update_of_rank_0() -> None:
    check_finite("lora_A", torch.ones(0, 4))


def test_what_has_not_changed() -> None:
    start = cast(Any, Start(a=torch.ones(2, 2), b=torch.zeros(3)))
    same = {"a": torch.ones(2, 2), "b": torch.zeros(3)}
    assert check_changes(same, start, updated=False) == []
    assert check_changes({"a": same["a"] + 1, "b": same["b"] + 1}, start, updated=True) == []
    (note,) = check_changes({**same, "a": same["a"] + 1}, start, updated=True)
    assert note.startswith("1 of the 2 trained tensors are as they began")
    assert note.endswith(": b")
    with pytest.raises(NumbersError, match="none of the trained tensors has changed"):
        check_changes(same, start, updated=True)


@pytest.fixture
def group() -> Iterator[None]:
    yield
    if dist.is_initialized():  # a run that fails leaves it to the end of the process
        dist.destroy_process_group()


def config(folder: Path, **options: Any) -> Path:
    return tiny.tiny_config(folder, "llama", tuning={"method": "lora", "rank": 2}, **{"duration__steps": 2, **options})


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("loses", ["half", "all of a tensor"])
def test_a_run_whose_gathering_loses_values(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], loses: str
) -> None:
    """As trainers elsewhere do when they save an adapter that is split over ranks."""
    gather = Replicated.full_trained

    def losing(self: Replicated) -> Iterator[tuple[str, Tensor | None]]:
        for name, tensor in gather(self):
            assert tensor is not None
            if "lora_B" in name:
                tensor[len(tensor) // 2 if loses == "half" else 0 :] = 0
            yield name, tensor

    monkeypatch.setattr(Replicated, "full_trained", losing)
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    assert cli.main(["train", "--config", str(config(tmp_path))]) == 5
    assert "final: the result is not whole, and was not written" in capsys.readouterr().err
    assert not list((tmp_path / "runs" / "tiny").glob("final*"))


@pytest.mark.usefixtures("group")
@pytest.mark.parametrize("options", [{"optimizer__lr": 0.0}, {"duration__steps": 0}], ids=["no rate", "no steps"])
def test_a_run_that_has_nothing_to_change(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], options: dict[str, Any]
) -> None:
    monkeypatch.setenv("SHARDTUNE_CACHE", str(tmp_path / "cache"))
    path = tiny.tiny_config(
        tmp_path, "llama", tuning={"method": "lora", "rank": 2}, **{"duration__steps": 2, **options}
    )
    assert cli.main(["train", "--config", str(path)]) == 0, capsys.readouterr().err
    assert (tmp_path / "runs" / "tiny" / "final" / "adapter_model.safetensors").exists()
    assert "as they began" not in capsys.readouterr().err
