"""TensorBoard's event files."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from shardtune.tracking.storage import storage
from shardtune.tracking.tracker import Histogram, leaves


class TensorBoardTracker:
    """Event files for TensorBoard. Values are stored in float32; a crash loses the last ten seconds."""

    def __init__(self, folder: Path, after: int | None = None) -> None:
        """Makes `folder`, or goes on `after` a step: readers then leave out what is there of later ones.

        Raises StorageError when it cannot be written, as do the other methods.
        """
        from torch.utils.tensorboard import SummaryWriter

        self.folder = folder
        self._begins_at = after or 0
        self._config: dict[str, Any] = {}
        with storage(folder):
            purged = None if after is None else after + 1
            self._writer = SummaryWriter(str(folder), flush_secs=10, purge_step=purged)

    def start(self, config: dict[str, Any]) -> None:
        """Shows the config as a text called `config`, at the step that this part of the run begins after."""
        self._config = config
        lines = json.dumps(config, indent=2, ensure_ascii=False, default=str).splitlines()
        with storage(self.folder):
            # Indented by four, Markdown shows it as it is.
            self._writer.add_text("config", "\n".join("    " + line for line in lines), self._begins_at)

    def scalars(self, step: int, values: Mapping[str, float]) -> None:
        """Adds a point to each curve."""
        with storage(self.folder):
            for name, value in values.items():
                self._writer.add_scalar(name, value, step)

    def texts(self, step: int, name: str, texts: Sequence[str]) -> None:
        """Adds text i as `name/i`, so that one example's predictions can be followed over the steps."""
        with storage(self.folder):
            for index, text in enumerate(texts):
                self._writer.add_text(f"{name}/{index}", text, step)

    def histograms(self, step: int, values: Mapping[str, Histogram]) -> None:
        """Adds the intervals that hold something, and one on each side, as TensorBoard does itself."""
        with storage(self.folder):
            for name, histogram in values.items():
                (filled,) = histogram.counts.nonzero()
                if not len(filled):
                    continue
                first, last = max(int(filled[0]) - 1, 0), min(int(filled[-1]) + 2, len(histogram.counts))
                self._writer.add_histogram_raw(
                    name,
                    min=float(histogram.edges[filled[0]]),
                    max=float(histogram.edges[filled[-1] + 1]),
                    num=int(histogram.counts.sum()),
                    sum=histogram.sum,
                    sum_squares=histogram.squares,
                    bucket_limits=histogram.edges[first + 1 : last + 1].tolist(),
                    bucket_counts=histogram.counts[first:last].tolist(),
                    global_step=step,
                )

    def close(self, final: Mapping[str, float] | None) -> None:
        """Enters a run that came to its end in the table of runs (the tab HPARAMS), writes out what is left, and ends
        the writer's thread.

        The table's columns are the values of the config and the final scores, which it takes from the curves of the
        same names; so the entry is in the same folder as these. TensorBoard knows one entry a folder, the first.
        """
        from torch.utils.tensorboard.summary import hparams

        with storage(self.folder):
            if final is not None:
                for summary in hparams(dict(leaves(self._config)), dict(final)):
                    self._writer._get_file_writer().add_summary(summary)
            self._writer.close()
