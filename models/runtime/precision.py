"""Choice of device and of the precision of matrix products."""

from __future__ import annotations

import time
from functools import lru_cache

import torch
from transformers import PreTrainedModel

from configs.choices import Device, check_choice
from configs.errors import UserError

_NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16"}


def choose_device(wanted: str) -> str:
    """Resolve a device name to ``cpu`` or ``cuda``; ``auto`` is CUDA if available.

    Raises:
        UserError: another name, or CUDA on a machine without it.
    """
    check_choice("`device`", wanted, Device)
    available = torch.cuda.is_available()
    if wanted == "cuda" and not available:
        raise UserError("expected a CUDA device, got none on this machine; set device to cpu or auto")
    return "cuda" if wanted != "cpu" and available else "cpu"


def autocast_to_bf16(precision: str, device: str = "cpu") -> bool:
    """Whether to run under ``torch.autocast`` to bf16; ``auto`` does if bf16 is faster on the device."""
    return bf16_is_faster(device) if precision == "auto" else precision == "bf16"


def bf16_is_faster(device: str = "cpu") -> bool:
    """Whether the device multiplies matrices faster in bf16 than in fp32; see ``beats_fp32``."""
    return beats_fp32(torch.bfloat16, device)


@lru_cache
def beats_fp32(dtype: torch.dtype, device: str = "cpu", size: int = 256) -> bool:
    """Whether the device multiplies matrices faster in a 16-bit dtype than in fp32.

    Measured once per process, in a few milliseconds. Processors without instructions for the dtype emulate them and
    take up to thirty times as long.
    """
    if device != "cpu":
        return dtype == torch.float16 or torch.cuda.is_bf16_supported(including_emulation=False)
    return _seconds(dtype, size) < _seconds(torch.float32, size)


def faster_dtype(stored: torch.dtype, device: str = "cpu") -> torch.dtype:
    """Dtype to compute with weights stored in ``stored``: fp32 for 16 bits if the device is faster with it.

    Weights of other dtypes keep theirs, so that none are rounded.
    """
    half = stored in (torch.bfloat16, torch.float16)
    return torch.float32 if half and not beats_fp32(stored, device) else stored


def precision_name(model: PreTrainedModel) -> str:
    """Precision of the weights of an opened model: ``fp32``, ``bf16``, ``fp16``, ``nf4`` or torch's name."""
    if any(parameter.dtype == torch.uint8 for parameter in model.parameters()):
        return "nf4"
    return _NAMES.get(model.dtype, str(model.dtype).removeprefix("torch."))


def _seconds(dtype: torch.dtype, size: int) -> float:
    matrix = torch.ones(size, size, dtype=dtype)
    times = []
    for _ in range(3):
        start = time.perf_counter()
        torch.mm(matrix, matrix)
        times.append(time.perf_counter() - start)
    return min(times)
