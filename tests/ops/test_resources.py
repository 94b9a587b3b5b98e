"""Every kernel builds for every GPU it is meant for, and takes what the table says."""

from __future__ import annotations

import datetime
import json
import os
import zlib

import pytest
import resources

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
