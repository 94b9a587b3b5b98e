"""One rank that loads a model, ours or the peer's way, and notes what it took.

The first argument is a JSON object of settings; see `main`. Writes what each rank found to <out>.<rank>.
"""

from __future__ import annotations

import gc
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from _loading_files import values_of
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, logging

from shardtune.assemble.parts import make_strategy
from shardtune.checkpoint.finding import newest_good
from shardtune.checkpoint.reading import open_checkpoint
from shardtune.model.overlay import Overlay
from shardtune.model.skeleton import build_skeleton, load_architecture
from shardtune.world import World, join_world

CHECKED = 7
"""Every so many parameters, the values are compared with those that were written."""


def ours(settings: dict[str, Any], world: World) -> nn.Module:
    """Each rank reads its part of every parameter from a checkpoint, under fsdp2; `verify`: finds it first."""
    folder = Path(settings["checkpoints"])
    path = newest_good(folder, world, print) if settings["verify"] else next(folder.iterdir())
    assert path is not None
    checkpoint = open_checkpoint(path)
    architecture = load_architecture(settings["model"], "causal", False)
    made = build_skeleton(architecture, settings["model"], "causal", False, "auto", None, False)
    model = made.model.requires_grad_(True)
    weights = Overlay(
        made.weights(model, 0, torch.float32), {name: checkpoint.value(name) for name in checkpoint.names()}
    )
    strategy = make_strategy("fsdp2", model, world, torch.float32)
    strategy.prepare(model, weights, None)
    return strategy.model


def peer(settings: dict[str, Any], world: World) -> nn.Module:
    """transformers reads the model on rank 0, which sends it to the others, parameter by parameter."""
    if world.is_first:
        model: Any = AutoModelForCausalLM.from_pretrained(settings["model"], dtype=torch.float32)
    else:
        with torch.device("meta"):
            model = AutoModelForCausalLM.from_config(AutoConfig.from_pretrained(settings["model"]), dtype=torch.float32)
        model.to_empty(device="cpu")
    for parameter in model.parameters():
        dist.broadcast(parameter.data, 0)
    return model


def status(key: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(f"{key}:"))


def counted(key: str) -> int:
    """Bytes that this process has read: rchar asked for, read_bytes from the disk, pages of mapped files included."""
    lines = Path("/proc/self/io").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(f"{key}:"))


def measured(load: Callable[[dict[str, Any], World], nn.Module], settings: dict[str, Any], world: World) -> Any:
    """Loads once, all ranks at the same time; and looks whether what was loaded is what was written."""
    gc.collect()
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is a new peak
    world.sum([0.0])
    resident, asked, read, begun = status("VmRSS"), counted("rchar"), counted("read_bytes"), time.perf_counter()
    model = load(settings, world)
    world.sum([0.0])
    found = {
        "seconds": time.perf_counter() - begun, "resident": status("VmHWM") - resident,
        "asked": counted("rchar") - asked, "read": counted("read_bytes") - read,
    }  # fmt: skip
    for index, (name, parameter) in enumerate(model.named_parameters()):
        if index % CHECKED == 0:
            whole: Any = parameter.detach()
            local = whole.to_local() if hasattr(whole, "to_local") else whole
            expected = values_of(index, tuple(whole.shape))
            if local.shape != whole.shape:
                expected = expected.chunk(world.size)[world.rank]
            assert torch.equal(local, expected), name
    return found


def main() -> None:
    """`side`: ours or peer; `model` and `checkpoints`: folders; `tiny`: the same of a model to warm up with."""
    logging.set_verbosity_error()
    logging.disable_progress_bar()
    settings: dict[str, Any] = json.loads(sys.argv[1])
    world = join_world()
    load = {"ours": ours, "peer": peer}[settings["side"]]
    measured(load, {**settings, **settings["tiny"]}, world)  # imports, and what libraries allocate at first use
    found = measured(load, settings, world)
    Path(f"{settings['out']}.{world.rank}").write_text(json.dumps(found), encoding="utf-8")
    world.close()


if __name__ == "__main__":
    main()
