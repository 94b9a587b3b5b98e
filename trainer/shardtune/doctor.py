"""What this machine can run, and what is missing."""

from __future__ import annotations

import importlib.util
import os
import platform
import shutil

from shardtune.run_folder import LIBRARIES, version
from shardtune.text_table import table

OPTIONAL = {"flash_attn": "model.attention: flash_attention_2 (pip install shardtune[flash])"}


def examine() -> str:
    """A table of findings, and below it what is missing and what that means."""
    import torch

    rows = [["python", platform.python_version()], ["processor", f"{os.cpu_count()} cores"]]
    rows += [[name, version(name) or "missing"] for name in LIBRARIES]
    problems = [f"{name} is not installed; run `make setup`" for name in LIBRARIES if version(name) is None]
    if torch.cuda.is_available():
        for index in range(torch.cuda.device_count()):
            properties = torch.cuda.get_device_properties(index)
            memory = properties.total_memory / 2**30
            rows.append([f"GPU {index}", f"{properties.name}, {memory:.0f} GiB, {properties.major}.{properties.minor}"])
        if not torch.cuda.is_bf16_supported(False):
            problems.append("the GPU has no bfloat16; use model.dtype=float32")
    else:
        rows.append(["GPU", "none"])
        problems.append("no GPU: every strategy runs on the CPU with gloo, slowly; model.dtype=float32 suits it")
    rows.append(["sbatch", shutil.which("sbatch") or "none"])
    for name, use in OPTIONAL.items():
        if importlib.util.find_spec(name) is None:
            problems.append(f"{name} is not installed, which is needed only for {use}")
    return "\n".join([table(rows, ["what", "found"]), "", *problems])
