"""Every kernel builds for every GPU it is meant for, and takes what the table says."""

from __future__ import annotations

import datetime
import importlib
import json
import os
import zlib
from collections.abc import Iterator

import pytest
import resources

from shardtune_kernels import _lora_kernels as lora
from shardtune_kernels._builds import Build
from shardtune_kernels._launch import INTERPRETED

pytestmark = pytest.mark.skipif(INTERPRETED, reason="the interpreter does not compile")
TABLE = json.loads(resources.TABLE.read_text(encoding="utf-8"))
BUILDS = [] if INTERPRETED else resources.all_builds()
SPILLS_WITH_REASON: dict[str, str] = {}
"""Builds that spill registers on 8.0 or 9.0, and why that is faster."""


def test_the_table_has_every_kernel() -> None:
    assert sorted(TABLE) == sorted(build.name for build in BUILDS), "run `make resources`"


def tried(name: str) -> tuple[int, ...]:
    """The GPUs that a kernel is built for: 8.0, 9.0, and each day another; all with SHARDTUNE_TEST_ALL=1."""
    if os.environ.get("SHARDTUNE_TEST_ALL") == "1":
        return resources.CAPABILITIES
    others = [capability for capability in resources.CAPABILITIES if capability not in (80, 90)]
    today = datetime.datetime.now(datetime.UTC).date().toordinal()
    return 80, 90, others[(zlib.crc32(name.encode()) + today) % len(others)]


@pytest.mark.parametrize(
    ("build", "capability"),
    [pytest.param(build, cc, id=f"{build.name}-{cc}") for build in BUILDS for cc in tried(build.name)],
)
def test_builds(build: resources.Build, capability: int) -> None:
    assert resources.measure(build, capability) == TABLE[build.name][str(capability)], "run `make resources`"


@pytest.mark.parametrize("name", sorted(TABLE))
def test_nothing_spills(name: str) -> None:
    spilled = {cc: row["spilled"] for cc, row in TABLE[name].items() if cc in ("80", "90") and row["spilled"]}
    assert not spilled or name in SPILLS_WITH_REASON, spilled


@pytest.mark.parametrize("name", sorted(TABLE))
def test_shared_memory_suffices(name: str) -> None:
    for capability, row in TABLE[name].items():
        if capability == "75" and f"{name.split(',')[0]}, 64 KB" in TABLE:
            continue  # another build is started there
        assert row["shared"] <= 1024 * resources.SHARED[int(capability)], capability


def _largest() -> Iterator[tuple[int, str, Build]]:
    """What takes most shared memory of all that an op may start: capability, dtype, build."""
    known = {build.name: build for build in BUILDS}
    for layers, rank in ((3, 16), (2, 32), (1, 64)):
        for kind in ("down", "gradients of down"):
            given = known[f"lora_linear {kind} of 1, rank 16"]
            constants = {**given.constants, "P": layers, "R": rank}
            warps = lora._warps_of_down(layers) if kind == "down" else given.num_warps
            stages = lora.stages_of(4) if kind == "down" else given.num_stages
            named = f"lora_linear {kind} of {layers}, rank {rank}"
            yield 86, "fp32", given._replace(name=named, constants=constants, num_warps=warps, num_stages=stages)
    for dtype, itemsize in (("fp16", 2), ("fp32", 4)):
        rank, given = lora.LARGEST_RANK // itemsize, known["lora_linear gradients of up, rank 16"]
        for capability in (75, 86):
            columns = lora.up_columns(rank, itemsize, 1024 * resources.SHARED[capability])
            constants = {**given.constants, "R": rank, "BN": columns}
            named = f"lora_linear gradients of up, rank {rank}"
            warps, stages = 4 if itemsize == 2 else 8, lora.stages_of(itemsize)
            yield capability, dtype, given._replace(name=named, constants=constants, num_warps=warps, num_stages=stages)
    attention = importlib.import_module("shardtune_kernels._biased_attention_launch")
    for width, capability, dtype, itemsize in ((128, 75, "fp16", 2), (256, 75, "fp16", 2), (256, 86, "bf16", 2),
                                               (256, 86, "fp32", 4)):  # fmt: skip
        for name in ("forward", "q and bias", "kv"):
            m, n, warps, stages = attention._blocks_of(name, width, itemsize, capability < 80)
            given = known[f"biased_attention {name}"]
            constants = {**given.constants, "BLOCK_M": m, "BLOCK_N": n, "BLOCK_D": width}
            named = f"biased_attention {name}, {width} wide"
            yield capability, dtype, given._replace(name=named, constants=constants, num_warps=warps, num_stages=stages)


LARGEST = [] if INTERPRETED else list(_largest())


@pytest.mark.parametrize(
    ("capability", "dtype", "build"), LARGEST, ids=[f"{b.name}, {dtype}, {cc}" for cc, dtype, b in LARGEST]
)
def test_the_largest_fit(capability: int, dtype: str, build: Build) -> None:
    shared = resources.compiled(build, capability, dtype).metadata.shared
    assert shared <= 1024 * resources.SHARED[capability]
