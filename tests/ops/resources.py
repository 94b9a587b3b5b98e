"""Builds every kernel for every GPU it is meant for, on any machine, and reads what it takes: registers, spills, shared
memory. `python tests/ops/resources.py` (or `make resources`) writes the table that a test compares with."""

from __future__ import annotations

import importlib
import json
import re
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import triton
import triton.language as tl
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from shardtune_kernels import OPS
from shardtune_kernels._builds import Build

CAPABILITIES = (75, 80, 86, 89, 90, 100, 120)
SHARED = {75: 64, 80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
"""KB that a program can have."""
TABLE = Path(__file__).with_name("resources.json")
CUOBJDUMP = Path(triton.__file__).parent / "backends/nvidia/bin/cuobjdump"


def all_builds() -> list[Build]:
    """Of all ops."""
    modules = [importlib.import_module(f"shardtune_kernels.{name}") for name in dict.fromkeys(OPS.values())]
    return [build for module in modules for build in getattr(module, "BUILDS", [])]


def compiled(build: Build, capability: int, dtype: str | None = None) -> Any:
    """The kernel built for a GPU, with its assembly; in 16 bits unless `dtype` says otherwise."""
    dtype = dtype or ("bf16" if capability >= 80 else "fp16")
    constants = {k: _constant(v, dtype) for k, v in build.constants.items()}
    signature = {k: v.format(dtype=dtype) for k, v in build.signature.items()} | dict.fromkeys(constants, "constexpr")
    names = build.kernel.arg_names
    whole = [
        index for index, name in enumerate(names)
        if name in build.aligned or signature[name].startswith("*")
    ]  # fmt: skip
    source = ASTSource(
        build.kernel, {name: signature[name] for name in names}, {(names.index(k),): v for k, v in constants.items()},
        {(index,): [["tt.divisibility", 16]] for index in whole},
    )  # fmt: skip
    options = {"num_warps": build.num_warps, "num_stages": build.num_stages, **build.options}
    made = triton.compile(source, target=GPUTarget("cuda", capability, 32), options=options)
    for name, value in build.options.items():
        assert getattr(made.metadata, name) == value, f"{build.name}: {name} did not reach the compiler"
    return made


def measure(build: Build, capability: int) -> dict[str, int]:
    """Registers of a thread, bytes spilled by a thread, bytes of shared memory of a program."""
    made = compiled(build, capability)
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(made.asm["cubin"])
        file.flush()
        said = subprocess.run(
            [str(CUOBJDUMP), "--dump-resource-usage", file.name], capture_output=True, text=True, check=True
        ).stdout
    found = {key: int(value) for key, value in re.findall(r"(REG|STACK|LOCAL):(\d+)", said)}
    return {
        "registers": found["REG"], "spilled": max(found["STACK"], found["LOCAL"]),
        "shared": made.metadata.shared,
    }  # fmt: skip


def _constant(value: Any, dtype: str) -> Any:
    return {"bf16": tl.bfloat16, "fp16": tl.float16, "fp32": tl.float32}[dtype] if value == "{dtype}" else value


def main() -> None:
    """Writes the table; arguments: parts of names of builds to do, the others stay as they are."""
    table: dict[str, Any] = json.loads(TABLE.read_text()) if TABLE.exists() else {}
    builds = all_builds()
    for build in builds:
        if len(sys.argv) > 1 and not any(part in build.name for part in sys.argv[1:]):
            continue
        table[build.name] = {str(cc): measure(build, cc) for cc in CAPABILITIES}
        print(build.name, table[build.name]["80"], table[build.name]["90"], flush=True)
    known = {build.name for build in builds}
    rows = {name: table[name] for name in sorted(table) if name in known}
    lines = [f'  "{name}": {{\n' + ",\n".join(
        f'    "{cc}": {json.dumps(row)}' for cc, row in of.items()) + "\n  }" for name, of in rows.items()]  # fmt: skip
    TABLE.write_text("{\n" + ",\n".join(lines) + "\n}\n")


if __name__ == "__main__":
    main()
