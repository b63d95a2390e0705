"""Choice of device and of the precision of matrix products."""

from __future__ import annotations

import time
from functools import lru_cache

import torch

from configs.errors import UserError

PRECISIONS = ("auto", "bf16", "fp32")
DEVICES = ("auto", "cpu", "cuda")


def choose_device(wanted: str) -> str:
    """Resolve a device name to ``cpu`` or ``cuda``; ``auto`` is CUDA if available.

    Raises:
        UserError: another name, or CUDA on a machine without it.
    """
    if wanted not in DEVICES:
        raise UserError(f"expected device to be one of {', '.join(DEVICES)}, got {wanted!r}")
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("expected a CUDA device, got none on this machine; set device to cpu or auto")
    return "cuda" if wanted != "cpu" and available else "cpu"


def autocast_to_bf16(precision: str, device: str = "cpu") -> bool:
    """Whether to run under ``torch.autocast`` to bf16; ``auto`` does if bf16 is faster on the device."""
    return bf16_is_faster(device) if precision == "auto" else precision == "bf16"


@lru_cache
def bf16_is_faster(device: str = "cpu", size: int = 256) -> bool:
    """Whether the device multiplies matrices faster in bf16 than in fp32, by a measurement of a few milliseconds.

    Processors without bf16 instructions emulate them and take up to thirty times as long.
    """
    if device != "cpu":
        return torch.cuda.is_bf16_supported(including_emulation=False)
    return _seconds(torch.bfloat16, size) < _seconds(torch.float32, size)


def _seconds(dtype: torch.dtype, size: int) -> float:
    matrix = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - start)
    return min(times)
