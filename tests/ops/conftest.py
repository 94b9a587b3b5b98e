"""The ops are tested as plain torch, as Triton kernels in the interpreter (TRITON_INTERPRET=1; `make test` does both),
and on a GPU where there is one."""

from __future__ import annotations

import torch

torch.set_num_threads(1)  # tests of broken kernels fork
