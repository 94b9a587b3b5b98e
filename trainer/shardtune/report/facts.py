"""What was run, on what data, at which cost, and what there is to be careful about."""

from __future__ import annotations

import json
import shlex
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

from shardtune.overfitting import warnings_in
from shardtune.report.charts import Histogram, histogram
from shardtune.report.files import RunFiles, finite
from shardtune.report.scores import Cell, Table
from shardtune.report.words import plural, seconds, share, size_of, whole

MOST_LABELS = 20
MOST_WARNINGS = 40
SIDES = ("source", "target")
CUT_FROM = 0.1
"""The share of cut texts from which on that is a warning."""
Fact = tuple[str, str]


def what_was_run(run: RunFiles) -> list[Fact]:
    """Model, task, data, method, strategy, devices, versions."""
    setting, environment = run.setting, run.environment
    devices = environment.get("devices")
    ranks = finite(environment.get("ranks"))
    found = [
        (
            "Model",
            _joined(
                setting("model.path"),
                _unless(setting("model.weights"), "pretrained", "weights"),
                setting("model.dtype"),
            ),
        ),
        ("Task", _joined(setting("task.kind"), setting("task.prompt"))),
        ("Training data", _sources(setting("data.train"))),
        ("Validation, test", _joined(_sources(setting("data.validation")), _sources(setting("data.test")))),
        ("Method", _options(setting("tuning", {}), "method")),
        ("Optimizer", _options(setting("optimizer", {}), "name")),
        ("A step", _step(run)),
        ("Steps", _steps(run)),
        (
            "Strategy",
            _joined(
                environment.get("strategy") or setting("strategy.kind"),
                _unless(setting("strategy.offload"), "none", "offload"),
            ),
        ),
        ("Ranks", whole(ranks) if ranks is not None else ""),
        ("Devices", _counted(devices) if isinstance(devices, list) else ""),
        ("Seed", str(setting("seed", ""))),
        ("Git commit", str(environment.get("git_commit") or "")),
        ("Python, system", _joined(environment.get("python"), environment.get("platform"))),
    ]
    return [(name, text) for name, text in found if text]


def versions(run: RunFiles) -> list[Fact]:
    """Of the libraries that are installed."""
    found = run.environment.get("versions")
    return [(str(name), str(version)) for name, version in found.items() if version] if isinstance(found, dict) else []


def subtitle(run: RunFiles) -> str:
    """One line under the name."""
    environment = run.environment
    devices = environment.get("devices")
    took = training_seconds(run)
    parts = [
        str(run.setting("model.path", "")).rstrip("/").rsplit("/", 1)[-1], run.setting("task.kind"),
        run.setting("tuning.method"), environment.get("strategy"),
        _counted(devices) if isinstance(devices, list) else None, plural(run.last_step, "step"),
        seconds(took) if took else None,
    ]  # fmt: skip
    return " · ".join(str(part) for part in parts if part)


def training_seconds(run: RunFiles) -> float | None:
    """Of all steps that lines tell of: each line has the mean of the steps since the line before."""
    total, before = 0.0, 0
    for line in run.training:
        took = finite(line.get("step_seconds"))
        if took is not None:
            total += took * (line["step"] - before)
        before = line["step"]
    return total or None


def cost(run: RunFiles) -> list[Fact]:
    """What is known of it; the rest is left out."""
    took = training_seconds(run)
    last = run.training[-1] if run.training else {}
    tokens, ranks = finite(last.get("tokens")), finite(run.environment.get("ranks"))
    epochs = finite(last.get("epoch"))
    peaks = [peak for line in run.training if (peak := finite(line.get("peak_memory_bytes"))) is not None]
    found = [
        ("Training", seconds(took) if took else ""),
        (
            "Device time",
            f"{took * ranks / 3600:,.2f} h on {plural(ranks, 'rank')}" if took and ranks and ranks > 1 else "",
        ),
        ("Epochs", f"{epochs:.3g}" if epochs else ""),
        ("Examples", _count(last.get("examples"))),
        ("Tokens", _count(tokens)),
        ("Target tokens", _count(last.get("target_tokens"))),
        ("Tokens a second", whole(tokens / took) if tokens and took else ""),
        ("Peak memory of a device", size_of(max(peaks)) if peaks else ""),
        ("Energy of the devices", _energy(last.get("energy_joules"))),
    ]
    return [(name, text) for name, text in found if text]


def fused(run: RunFiles) -> tuple[list[Fact], list[Fact]]:
    """What was fused, with the number of modules; and what was not, with the reason."""
    found = run.environment.get("fused")
    if not isinstance(found, dict):
        return [], []
    used = [(str(op), plural(many, "place")) for op, many in found.items() if finite(many) is not None]
    fell = [(str(op), str(why)) for op, why in found.items() if finite(why) is None]
    return used, fell


def command_line(run: RunFiles) -> str:
    """As a shell takes it; empty where it is not known."""
    words = run.environment.get("command_line")
    if not isinstance(words, list) or not words:
        return ""
    first = str(words[0]).rsplit("/", 1)[-1]
    return shlex.join(["shardtune" if first == "shardtune" else str(words[0]), *map(str, words[1:])])


def warnings(run: RunFiles) -> list[str]:
    """What a reader ought to know before believing the rest."""
    return list(dict.fromkeys(_warnings(run)))[:MOST_WARNINGS]


def _warnings(run: RunFiles) -> Iterator[str]:
    if not run.finished:
        yield f"The run has not come to its end: this is what there is up to step {run.last_step}."
    yield from (f"Overfitting: {text}." for text in warnings_in(run.evaluations))
    broken = [line["step"] for line in run.training if "loss" in line and finite(line["loss"]) is None]
    if broken:
        yield f"The loss was not finite at step {broken[0]}" + (f" and {len(broken) - 1} more." if broken[1:] else ".")
    overlap = run.data.get("overlap")
    for pair, count in overlap.items() if isinstance(overlap, dict) else ():
        first, _, second = pair.partition("/")
        if finite(count):
            of = run.data.get(second, {}).get("examples")
            found = f"{whole(count)} of {whole(finite(of))} examples of {second} also stand in {first}"
            yield f"{found}: scores on {second} flatter."
    for side in SIDES:
        cut = [(split, part) for split, part in run.data.items() if _cut_share(part, side) >= CUT_FROM]
        if cut:
            said = ", ".join(f"{share(part['truncated'][side], part['examples'])} of {split}" for split, part in cut)
            yield f"Many {side}s are longer than task.max_{side}_tokens and were cut: {said}."
    said = run.environment.get("warnings")
    yield from (str(text) for text in said) if isinstance(said, list) else ()


def _cut_share(part: object, side: str) -> float:
    """0 for what is no split."""
    if not isinstance(part, dict) or "examples" not in part:
        return 0.0
    return (finite((part.get("truncated") or {}).get(side)) or 0.0) / (finite(part["examples"]) or 1.0)


class Labels(NamedTuple):
    """How often each label is there."""

    rows: list[tuple[str, str, str, str]]
    """Label, count, share, and the bar's width."""
    left_out: int


@dataclass
class Data:
    """What is known of the splits."""

    table: Table
    histograms: list[Histogram]
    labels: dict[str, Labels]


def data_of(run: RunFiles) -> Data | None:
    """Of all splits that data.json knows; None where it knows none."""
    splits = {
        name: part for name, part in run.data.items() if name not in ("overlap", "dropped") and isinstance(part, dict)
    }
    if not splits:
        return None
    rows: dict[str, dict[str, Cell]] = {}
    for name, part in splits.items():
        for title, cell in _figures(part):
            rows.setdefault(title, {})[name] = cell
    table = Table(
        list(splits), [(title, [cells.get(name, Cell("–")) for name in splits]) for title, cells in rows.items()]
    )
    drawn = [
        histogram(f"lengths-{name}-{side}", f"Length of {side}s, {name}", lengths["histogram"], f"tokens of a {side}")
        for side in SIDES
        for name, part in splits.items()
        if (lengths := part.get(f"{side}_tokens")) and lengths["max"] > lengths["histogram"][0][0]
    ]
    labels = {name: found for name, part in splits.items() if (found := _labels(part.get("labels"))) is not None}
    return Data(table, [chart for chart in drawn if chart is not None], labels)


def _figures(part: dict[str, Any]) -> Iterator[tuple[str, Cell]]:
    """A split's column."""
    many = finite(part.get("examples"))
    yield "examples", Cell("streamed" if part.get("streamed") else whole(many))
    sources = part.get("sources")
    if isinstance(sources, dict) and len(sources) > 1:
        for source, count in list(sources.items())[:MOST_LABELS]:
            yield f"from {source}", Cell(whole(finite(count)), share(finite(count), many))
    truncated = part.get("truncated") or {}
    for side in SIDES:
        lengths = part.get(f"{side}_tokens")
        if isinstance(lengths, dict):
            for title, key in (("median", "median"), ("95\u00a0% are up to", "p95"), ("longest", "max")):
                yield f"{side} tokens, {title}", Cell(whole(finite(lengths.get(key))))
        if side in truncated:
            yield f"{side}s cut to length", Cell(whole(finite(truncated[side])), share(finite(truncated[side]), many))
    if "duplicates" in part:
        repeated = finite(part["duplicates"])
        yield "repeated examples", Cell(whole(repeated), share(repeated, many))


def overlaps(run: RunFiles) -> list[Fact]:
    """Of each two splits; and rows that were left out."""
    overlap, dropped = run.data.get("overlap"), run.data.get("dropped")
    found = [
        (f"{pair.partition('/')[2]} also in {pair.partition('/')[0]}", whole(finite(count)))
        for pair, count in (overlap.items() if isinstance(overlap, dict) else ())
    ]
    found += [
        (f"left out: {why}", whole(finite(n))) for why, n in (dropped.items() if isinstance(dropped, dict) else ())
    ]
    return found


def _labels(found: object) -> Labels | None:
    if not isinstance(found, dict) or not found:
        return None
    counts = {str(label): finite(count) or 0.0 for label, count in found.items()}
    total, most = sum(counts.values()), max(counts.values()) or 1.0
    ordered = sorted(counts.items(), key=lambda one: -one[1])
    rows = [
        (label, whole(count), share(count, total), f"{100 * count / most:.1f}%")
        for label, count in ordered[:MOST_LABELS]
    ]
    return Labels(rows, len(counts) - len(rows))


def _count(value: object) -> str:
    return "" if finite(value) is None else whole(finite(value))


def _joined(*parts: object) -> str:
    return ", ".join(str(part) for part in parts if part not in (None, ""))


def _unless(value: object, usual: str, what: str) -> str:
    return "" if value in (None, usual) else f"{value} {what}" if what == "weights" else f"{what}: {value}"


def _options(section: object, first: str) -> str:
    """lora: rank 16, alpha 32, …; what is null is left out."""
    if not isinstance(section, dict):
        return ""
    rest = [f"{key} {_plain(value)}" for key, value in section.items() if key != first and value is not None]
    return f"{section.get(first, '')}" + (": " + ", ".join(rest) if rest else "")


def _plain(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(shortest(value), ensure_ascii=False)


def shortest(value: Any) -> Any:
    """A float without the digits that come of arithmetic."""
    return float(f"{value:.12g}") if isinstance(value, float) else value


def _sources(given: object) -> str:
    if isinstance(given, list):
        return ", ".join(_sources(one) for one in given)
    if isinstance(given, dict):
        return " ".join(
            [str(given.get("path", "")), *(f"({k} {v})" for k, v in given.items() if k != "path" and v is not None)]
        )
    return "" if given is None else str(given)


def _step(run: RunFiles) -> str:
    batch = run.setting("batch", {})
    if not isinstance(batch, dict):
        return ""
    of = [
        plural(v, what) for key, what in (("examples", "example"), ("tokens", "token")) if (v := finite(batch.get(key)))
    ]
    return ", ".join([*of, *([f"batching {run.setting('data.batching')}"] if run.setting("data.batching") else [])])


def _steps(run: RunFiles) -> str:
    epochs = finite(run.training[-1].get("epoch")) if run.training else None
    return whole(run.last_step) + (f", {epochs:.3g} epochs" if epochs else "")


def _counted(names: list[Any]) -> str:
    return ", ".join(name if n == 1 else f"{n} × {name}" for name, n in Counter(map(str, names)).items())


def _energy(given: object) -> str:
    joules = finite(given)
    if joules is None:
        return ""
    hours = joules / 3600
    return f"{hours / 1000:,.2f} kWh" if hours >= 100 else f"{hours:,.2f} Wh"
