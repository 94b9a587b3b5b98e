"""The energy that a GPU has used, from NVIDIA's management library (NVML), which comes with the driver."""

from __future__ import annotations

import ctypes
import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    import torch

READ_SECONDS = 1.0
"""The device is asked no more often than this."""


class EnergyMeter:
    """Joules that this rank's device has used since the meter was made."""

    def __init__(self, device: torch.device) -> None:
        """A device that does not tell has no meter: `joules` is None."""
        self._library: ctypes.CDLL | None = None
        self._handle = ctypes.c_void_p()
        self._read_at = time.monotonic()
        self._joules: float | None = None
        if device.type == "cuda" and self._open(device):
            self._begin = self._counter()
            self._joules = None if self._begin is None else 0.0

    def joules(self) -> float | None:
        """At most `READ_SECONDS` old."""
        now = time.monotonic()
        if self._joules is not None and now - self._read_at >= READ_SECONDS:
            self._read_at, counter = now, self._counter()
            if counter is not None and self._begin is not None:
                self._joules = (counter - self._begin) / 1000
        return self._joules

    def _open(self, device: torch.device) -> bool:
        import torch

        try:
            library = ctypes.CDLL("libnvidia-ml.so.1")
            uuid = f"GPU-{torch.cuda.get_device_properties(device).uuid}".encode()
            if library.nvmlInit_v2() or library.nvmlDeviceGetHandleByUUID(uuid, ctypes.byref(self._handle)):
                return False
        except (OSError, AttributeError):
            return False
        self._library = library
        return True

    def _counter(self) -> int | None:
        """Millijoules since the driver was loaded."""
        value = ctypes.c_ulonglong()
        if self._library is None:
            return None
        failed = self._library.nvmlDeviceGetTotalEnergyConsumption(self._handle, ctypes.byref(value))
        return None if failed else value.value
