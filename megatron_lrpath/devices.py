"""Peak rates of accelerators from the vendors' data sheets, the reference of model-FLOPs utilization."""

from __future__ import annotations

# Dense (no sparsity) bf16 FLOP/s by a part of the device's name, more special names first.
PEAKS = {
    "GB300": 2500e12,
    "GB200": 2500e12,
    "B300": 2250e12,
    "B200": 2250e12,
    "H20": 148e12,
    "GH200": 989e12,
    "H200": 989e12,
    "H100 PCIe": 756e12,
    "H100 NVL": 835e12,
    "H100": 989e12,
    "H800": 989e12,
    "A100": 312e12,
    "A800": 312e12,
    "L40S": 362e12,
    "A40": 149.7e12,
    "A30": 165e12,
    "MI300X": 1307e12,
    "MI250X": 383e12,
}


def peak_flops(name: str) -> float | None:
    """Return the peak rate (bf16, FLOP/s) of the device with this name; None if it is not in the list."""
    parts = name.replace("-", " ").split()
    for known, peak in PEAKS.items():
        if all(part in parts for part in known.split()):
            return peak
    return None
