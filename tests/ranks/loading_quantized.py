"""How much memory the ranks take while a 4-bit model is loaded: torchrun loading_quantized.py STRATEGY MODEL

Prints one JSON line: bytes of the whole quantized model, what each rank holds, and each rank's peak.
"""

import gc
import json
import sys
from pathlib import Path

import torch
from loading_memory import resident

from shardtune.assemble.parts import make_strategy
from shardtune.assemble.quiet import quiet_libraries
from shardtune.assemble.stored import stored
from shardtune.model.quantized import QuantizedLinear, quantize_layers
from shardtune.model.quantized_weights import QuantizedWeights
from shardtune.model.skeleton import build_skeleton, load_architecture
from shardtune.quantization import Quantization
from shardtune.world import World, join_world

DTYPE = torch.bfloat16


def load(kind: str, folder: str, world: World) -> dict[str, object]:
    """Loads the model, and says what it took."""
    architecture = load_architecture(folder, "causal", False)
    made = build_skeleton(architecture, folder, "causal", True, "auto", None, False)
    model = made.model.requires_grad_(False)
    quantize_layers(made.model, "causal", made.recorder, Quantization("nf4"), DTYPE, folder)
    packed = sum(m.weight.nbytes for m in model.modules() if isinstance(m, QuantizedLinear))
    size = sum(t.nbytes for t in [*model.parameters(), *model.buffers()])
    weights = QuantizedWeights(model, made.weights(model, 0, DTYPE), world.device, world.largest)
    strategy = make_strategy(kind, model, world, DTYPE)
    gc.collect()
    before = resident("VmRSS")
    Path("/proc/self/clear_refs").write_text("5")  # from here on VmHWM is a new peak
    strategy.prepare(model, weights, None)
    peaks = world.gather([resident("VmHWM") - before, *stored(model)])
    return {
        "size": size, "packed": packed, "peaks": [peak for peak, *_ in peaks], "held": [held[0] for _, *held in peaks],
        "scales": [held[1] + held[2] for _, *held in peaks],
    }  # fmt: skip


def main() -> None:
    kind, folder = sys.argv[1:]
    world = join_world()
    with quiet_libraries():
        load(kind, f"{folder}-tiny", world)  # what libraries import and allocate at first use is not counted
        gc.collect()
        result = load(kind, folder, world)
        if world.is_first:
            print(json.dumps(result), flush=True)
    world.close()


if __name__ == "__main__":
    main()
