"""Where micro-batches are padded: on the host, or by a kernel on the device that computes."""

from __future__ import annotations

import torch

from shardtune.fused.plan import runs_kernels
from shardtune.ragged import LayOut, Rows, Stream


def device_padding(device: torch.device) -> LayOut | None:
    """What a task is to be given for `device`: a kernel's launch where there are kernels, and None, the host, where
    there are none."""
    return lay_out_on_device if runs_kernels(device) else None


def lay_out_on_device(stream: Stream) -> Rows:
    """Pads or packs a stream where it is."""
    import shardtune_kernels  # half a second, which a run without kernels need not wait

    tokens, offsets, learned_from = stream[:3]
    if stream.width is None:
        return shardtune_kernels.pack(tokens, offsets, learned_from=learned_from, start=stream.start)
    return shardtune_kernels.pad(
        tokens, offsets, stream.width, fill=stream.fill, learned_from=learned_from, start=stream.start
    )
