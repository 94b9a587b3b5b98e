"""Kernels start on the GPU that their tensors lie on."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import pytest
import torch
from torch import Tensor

from shardtune_kernels._launch import writes

SEEN: list[int] = []


@writes("out")
def launch(out: Tensor | None, other: Tensor, number: int) -> None:
    SEEN.append(torch.cuda.current_device())


class OnSecondGpu(Tensor):
    """Says so."""

    is_cuda = True  # pyright: ignore[reportAssignmentType]
    device = torch.device("cuda", 1)  # pyright: ignore[reportAssignmentType]


@pytest.mark.parametrize("current", [0, 1])
def test_a_kernel_starts_on_the_gpu_of_its_tensor(current: int, monkeypatch: pytest.MonkeyPatch) -> None:
    @contextmanager
    def device_of(tensor: Tensor) -> Iterator[None]:
        monkeypatch.setattr(torch.cuda, "current_device", lambda: tensor.device.index)
        yield

    monkeypatch.setattr(torch.cuda, "current_device", lambda: current)
    monkeypatch.setattr(torch.cuda, "device_of", device_of)
    SEEN.clear()
    launch(None, torch.zeros(2).as_subclass(OnSecondGpu), 3)
    assert SEEN == [1]
