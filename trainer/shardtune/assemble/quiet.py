"""Libraries that say only what is wrong."""

from __future__ import annotations

import logging
import os
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager

import torch
import transformers


@contextmanager
def quiet_libraries() -> Iterator[None]:
    """A good run's output is calm: libraries say only what is wrong."""
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    if not torch.cuda.is_available():
        os.environ.setdefault("DS_ACCELERATOR", "cpu")  # or DeepSpeed, which peft imports, warns that it chose this
    for name in ("DeepSpeed", "torch.distributed", "huggingface_hub", "datasets", "bitsandbytes"):
        logging.getLogger(name).setLevel(logging.ERROR)
    with warnings.catch_warnings():
        if not sys.warnoptions:
            warnings.simplefilter("ignore")
        yield
