"""How much memory a rank takes while a model is loaded: torchrun loading_memory.py STRATEGY MODEL:WEIGHTS …

Prints one JSON line for each model: bytes of all parameters, of the largest layer, and each rank's peak.
"""

import gc
import json
import sys
from pathlib import Path

import torch

from shardtune.assemble.parts import make_strategy
from shardtune.assemble.quiet import quiet_libraries
from shardtune.layers import layer_names
from shardtune.model.skeleton import build_skeleton, load_architecture
from shardtune.model.weights import InitialWeights
from shardtune.world import World, join_world

TASKS = {"t5": "seq2seq", "llama": "causal"}


def resident(key: str) -> int:
    """VmRSS or VmHWM (its peak) of this process, in bytes."""
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(f"{key}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(key)


def skeleton(folder: str, weights: str) -> tuple[torch.nn.Module, InitialWeights]:
    architecture = load_architecture(folder, TASKS[Path(folder).name.partition("-")[0]], False)
    task = TASKS[architecture.model_type]
    made = build_skeleton(architecture, folder, task, weights == "pretrained", "auto", None, False)
    model = made.model.requires_grad_(True)
    return model, made.weights(model, 0, torch.float32)


def load(kind: str, model: torch.nn.Module, weights: InitialWeights, world: World) -> object:
    strategy = make_strategy(kind, model, world, torch.float32)
    strategy.prepare(model, weights, None)
    return strategy


def measured(kind: str, folder: str, weights: str, world: World) -> dict[str, object]:
    model, initial = skeleton(folder, weights)
    sizes = {name: p.numel() * 4 for name, p in model.named_parameters()}
    layers = [sum(size for name, size in sizes.items() if name.startswith(f"{layer}.")) for layer in layer_names(model)]
    beside = sum(sizes.values()) - sum(layers)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is a new peak
    held = load(kind, model, initial, world)
    peaks = world.gather([resident("VmHWM") - before, resident("VmRSS") - before])
    del held
    return {
        "strategy": kind, "model": Path(folder).name, "weights": weights, "bytes": sum(sizes.values()),
        "layer": max(*layers, beside), "peaks": [p for p, _ in peaks], "after": [a for _, a in peaks],
    }  # fmt: skip


def main() -> None:
    kind, *models = sys.argv[1:]
    world = join_world()
    with quiet_libraries():
        for index, words in enumerate(models):
            folder, _, weights = words.rpartition(":")
            if not index:  # what libraries import and allocate at first use is not counted
                load(kind, *skeleton(f"{folder}-tiny", "random"), world)
            result = measured(kind, folder, weights, world)
            if world.is_first:
                print(json.dumps(result), flush=True)
    world.close()


if __name__ == "__main__":
    main()
