"""Where micro-batches are padded: on the host, or by a kernel on the device that computes."""

from __future__ import annotations

import os
from typing import TYPE_CHECKING

import torch

from shardtune.ragged import LayOut, Stream

if TYPE_CHECKING:
    from shardtune_kernels import padding


def device_padding(device: torch.device) -> LayOut | None:
    """What a task is to be given for `device`: a kernel's launch where there are kernels, and None, the host, where
    there are none."""
    return lay_out_on_device if device.type == "cuda" or os.environ.get("TRITON_INTERPRET") == "1" else None


def lay_out_on_device(stream: Stream) -> padding.Rows:
    """Pads or packs a stream where it is."""
    import shardtune_kernels  # takes a while to import, and is not needed where the host does it

    tokens, offsets, learned_from = stream[:3]
    if stream.width is None:
        return shardtune_kernels.pack(tokens, offsets, learned_from=learned_from, start=stream.start)
    return shardtune_kernels.pad(
        tokens, offsets, stream.width, fill=stream.fill, learned_from=learned_from, start=stream.start
    )
