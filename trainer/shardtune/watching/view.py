"""How a watched run looks: a page on a terminal, and lines for a file."""

from __future__ import annotations

import itertools
from typing import Any

from rich.console import Group, RenderableType
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from shardtune.progress import duration
from shardtune.watching.run import WatchedRun, scores, title

BLOCKS = "▁▂▃▄▅▆▇█"
SPARK_WIDTH = 40
SHOWN_CHECKPOINTS = 3
BYTES_IN_GB = 1e9


def page(run: WatchedRun) -> RenderableType:
    """All there is to say of a run now."""
    rows = Table.grid(padding=(0, 2, 0, 0))
    rows.add_column(style="dim", no_wrap=True)
    rows.add_column()
    if run.share is not None:
        rows.add_row("done", ProgressBar(total=1.0, completed=run.share, width=SPARK_WIDTH))
    for name, value in facts(run):
        rows.add_row(name, Text(value))
    return Group(Text(heading(run), style="bold"), rows)


def plain_page(run: WatchedRun) -> str:
    """The same as text, a line for each figure."""
    rows = facts(run)
    width = max(len(name) for name, _ in rows)
    return "\n".join([heading(run), *(f"{name:<{width}}  {value}".rstrip() for name, value in rows)])


def heading(run: WatchedRun) -> str:
    """Where the run is, and whether it goes on."""
    silent = duration(run.silent_seconds)
    state = {
        "finished": "finished",
        "running": f"running, last line {silent} ago",
        "silent": f"no line for {silent}: it has stopped, or is evaluating or saving",
    }[run.state]
    return f"{run.folder.name}  {_position(run)}  {state}"


def facts(run: WatchedRun) -> list[tuple[str, str]]:
    """Pairs of what a figure is and what it says; only those that are known."""
    rows: list[tuple[str, str]] = []
    last = run.training[-1] if run.training else None
    if last is None:
        rows.append(("training", "no step yet"))
    else:
        if run.state != "finished" and run.seconds_left is not None:
            rows.append(("time left", duration(run.seconds_left)))
        losses = [line["loss"] for line in run.training if isinstance(line.get("loss"), (int, float))]
        rows.append(("loss", f"{_figure(last.get('loss'), '.4f')}  {sparkline(losses, SPARK_WIDTH)}"))
        rows += [
            ("learning rate", _figure(last.get("lr"), ".3g")),
            ("gradient norm", _figure(last.get("grad_norm"), ".4g")),
            ("tokens a second", _speed(last)),
            ("padding", _figure(last.get("padding_share"), ".1%")),
            ("waiting for data", _waiting(last)),
            ("memory", _memory(last)),
        ]
        if "slowest_rank" in last:
            more = _figure(last.get("slowest_rank_share"), ".0%")
            rows.append(("slowest rank", f"{last['slowest_rank']}, {more} longer than the mean by itself"))
    rows += [(name, f"{_scored(line)}  at step {line['step']}") for name, line in run.judged.items()]
    if run.checkpoints:
        shown = run.checkpoints[-SHOWN_CHECKPOINTS:]
        rows.append(("checkpoints", ("… " if len(run.checkpoints) > len(shown) else "") + " ".join(shown)))
    return rows


def line_of(run: WatchedRun, line: dict[str, Any]) -> str:
    """A line of metrics.jsonl as people read it."""
    if "split" in line:
        return f"{title(line)} at step {line['step']}  {_scored(line)}"
    total = run.total_steps
    number = f"{line['step']}/{total}" if total is not None else str(line["step"])
    return (
        f"step {number}  loss {_figure(line.get('loss'), '.4f')}  lr {_figure(line.get('lr'), '.3g')}  "
        f"grad norm {_figure(line.get('grad_norm'), '.4g')}  {_speed(line)} tokens/s"
    )


def sparkline(values: list[float], width: int) -> str:
    """The values as blocks from the lowest to the highest; more than `width` of them as means of neighbours."""
    if not values:
        return ""
    count = min(width, len(values))
    cuts = [len(values) * place // count for place in range(count + 1)]
    means = [sum(values[a:b]) / (b - a) for a, b in itertools.pairwise(cuts)]
    low, high = min(means), max(means)
    step = (high - low) / (len(BLOCKS) - 1)
    return "".join(BLOCKS[round((mean - low) / step)] if step > 0 else BLOCKS[0] for mean in means)


def _position(run: WatchedRun) -> str:
    total, share = run.total_steps, run.share
    if total is None or share is None:
        return f"step {run.step}"
    return f"step {run.step}/{total} ({share:.0%})"


def _scored(line: dict[str, Any]) -> str:
    return "  ".join(f"{name} {value:.4f}" for name, value in scores(line).items())


def _figure(value: Any, form: str) -> str:
    return format(value, form) if isinstance(value, (int, float)) else "not finite"


def _speed(line: dict[str, Any]) -> str:
    said = _figure(line.get("tokens_per_second"), ",.0f")
    return f"{said} (MFU {line['mfu']:.1%})" if isinstance(line.get("mfu"), float) else said


def _waiting(line: dict[str, Any]) -> str:
    seconds, step = line.get("data_seconds") or 0.0, line.get("step_seconds") or 0.0
    return f"{seconds / step:.1%} of a step of {step:.3g} s" if step else "-"


def _memory(line: dict[str, Any]) -> str:
    said = f"{(line.get('peak_memory_bytes') or 0) / BYTES_IN_GB:.2f} GB at most"
    if "memory_allocated_bytes" in line:
        said += f", {line['memory_allocated_bytes'] / BYTES_IN_GB:.2f} GB now"
    return said
