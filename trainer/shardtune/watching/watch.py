"""`shardtune watch`: looks at a run until it is finished or the one who watches has seen enough."""

from __future__ import annotations

import io
import sys
import time
from pathlib import Path

from rich.console import Console
from rich.live import Live

from shardtune.watching.run import WatchedRun
from shardtune.watching.view import heading, line_of, page, plain_page

LOOK_SECONDS = 1.0


def watch(folder: Path, once: bool) -> None:
    """Shows the run in `folder` on standard output: a page that changes if that is a terminal, otherwise lines as they
    come. `once`: the page as it is now, and no more. Returns when the run is finished; Ctrl-C is KeyboardInterrupt.

    Raises ConfigError where there is no run.
    """
    run = WatchedRun(folder)
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="replace")  # the blocks of a sparkline, where the locale has none
    console = Console(highlight=False)
    if once:
        run.look()
        console.print(page(run)) if console.is_terminal else print(plain_page(run))
    elif console.is_terminal:
        _page_after_page(run, console)
    else:
        _line_after_line(run)


def _page_after_page(run: WatchedRun, console: Console) -> None:
    run.look()
    with Live(page(run), console=console, auto_refresh=False) as live:
        while run.state != "finished":
            time.sleep(LOOK_SECONDS)
            run.look()
            live.update(page(run), refresh=True)


def _line_after_line(run: WatchedRun) -> None:
    known: list[str] = []
    while True:
        finished = run.state == "finished"  # before the look, which then finds the last line too
        for line in run.look():
            print(line_of(run, line), flush=True)
        for name in run.checkpoints:
            if name not in known:
                print(f"checkpoint {name}", flush=True)
        known = run.checkpoints
        if finished:
            print(heading(run), flush=True)
            return
        time.sleep(LOOK_SECONDS)
