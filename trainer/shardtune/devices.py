"""What devices can compute, as their makers say."""

from __future__ import annotations

PEAKS: dict[str, tuple[float, float]] = {
    "GB200": (2500e12, 80e12),
    "B200": (2250e12, 75e12),
    "H200": (989.4e12, 66.9e12),
    "GH200": (989.4e12, 66.9e12),
    "H100 PCIe": (756e12, 51.2e12),
    "H100 NVL": (835.5e12, 60e12),
    "H100": (989.4e12, 66.9e12),
    "H800": (989.4e12, 66.9e12),
    "A100": (312e12, 19.5e12),
    "A800": (312e12, 19.5e12),
    "A40": (149.7e12, 37.4e12),
    "A30": (165e12, 10.3e12),
    "A10G": (70e12, 31.5e12),
    "A10": (125e12, 31.2e12),
    "L40S": (362e12, 91.6e12),
    "L40": (181e12, 90.5e12),
    "L4": (121e12, 30.3e12),
    "RTX 6000 Ada": (364.2e12, 91.1e12),
    "RTX A6000": (154.8e12, 38.7e12),
    "RTX 4090": (165.2e12, 82.6e12),
    "RTX 3090": (71e12, 35.6e12),
}
"""Operations a second of NVIDIA's data sheets, without sparsity: in bfloat16 with float32 sums, and in float32 outside
of the tensor cores, as PyTorch multiplies float32 unless told otherwise. By a part of the device's name."""


def peak_flops(device: str, dtype: str) -> float | None:
    """Of the device with this name, in `bfloat16` or `float32`; None where that is not known."""
    words = device.replace("-", " ").split()
    if "Laptop" in words:  # which bear the names of faster ones
        return None
    for name in sorted(PEAKS, key=len, reverse=True):
        parts = name.split()
        if any(words[at : at + len(parts)] == parts for at in range(len(words))):
            return PEAKS[name][("bfloat16", "float32").index(dtype)] if dtype in ("bfloat16", "float32") else None
    return None
