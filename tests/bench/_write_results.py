"""Runs the benchmarks for a GPU, correctness first, and keeps each one's line in results/<benchmark>-<device>.json.

Where ops are not right, nothing is measured. A benchmark that fails does not stop the others, and leaves the file of an
earlier run as it is. `make bench-gpu` calls this; `--small --into FOLDER` tries it out on a CPU.
"""

from __future__ import annotations

import argparse
import json
import re
import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

HERE = Path(__file__).parent
RESULTS = HERE / "results"
CORRECTNESS = HERE / "gpu_correctness.py"


def run(script: Path, options: Sequence[str]) -> dict[str, Any] | None:
    """The line that a benchmark printed; None where it failed. What else it says is shown as it comes."""
    print(f"bench: {script.name}", file=sys.stderr, flush=True)
    begun = time.monotonic()
    done = subprocess.run([sys.executable, str(script), *options], stdout=subprocess.PIPE, text=True, check=False)
    print(done.stdout, end="", flush=True)
    try:
        line = json.loads(done.stdout) if done.returncode == 0 else None
    except json.JSONDecodeError:
        line = None
    said = f"took {time.monotonic() - begun:.0f} s" if line else f"failed with exit code {done.returncode}"
    print(f"bench: {script.name} {said}", file=sys.stderr, flush=True)
    return line


def write(line: dict[str, Any], folder: Path) -> Path:
    """Whole or not at all."""
    device = re.sub(r"[^A-Za-z0-9]+", "-", line["device"]).strip("-")
    path = folder / f"{line['benchmark']}-{device}.json"
    folder.mkdir(parents=True, exist_ok=True)
    part = path.with_suffix(".part")
    part.write_text(json.dumps(line, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")
    return part.replace(path)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("scripts", nargs="*", type=Path, help="benchmarks, instead of all")
    parser.add_argument("--small", action="store_true", help="try it out; needs --into")
    parser.add_argument("--into", type=Path, default=RESULTS, help="folder of the files")
    parser.add_argument("--correctness", type=Path, default=CORRECTNESS, help=argparse.SUPPRESS)
    given = parser.parse_args()
    if given.small and given.into.resolve() == RESULTS.resolve():
        raise SystemExit("bench: what --small finds is no result; say --into FOLDER")
    options = ["--small"] if given.small else []
    checked = run(given.correctness, options)
    if checked is None:
        raise SystemExit("bench: ops are not right on this device (see above); nothing is measured")
    write(checked, given.into)
    scripts = given.scripts or sorted(set(HERE.glob("gpu_*.py")) - {CORRECTNESS})
    failed = []
    for script in scripts:
        line = run(script, options)
        if line is None:
            failed.append(script.name)
        else:
            print(f"bench: wrote {write(line, given.into)}", file=sys.stderr, flush=True)
    if failed:
        raise SystemExit(f"bench: failed: {', '.join(failed)}")


if __name__ == "__main__":
    main()
