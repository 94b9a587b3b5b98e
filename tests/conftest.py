"""Before anything is imported: models this small are computed by one thread, more of them only wait for each other."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
