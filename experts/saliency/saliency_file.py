"""Validated reading of the arrays of a saliency file from an untrusted source (.npz of plain numbers)."""

from __future__ import annotations

import json
import zipfile
import zlib
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError

_SHAPE = ("num_layers", "num_experts")
_UNREADABLE = (OSError, EOFError, ValueError, TypeError, AttributeError, zipfile.BadZipFile, zlib.error)


def read_arrays(path: Path, names: Sequence[str]) -> dict[str, Any]:
    """Read arrays ``[num_layers, num_experts]`` by name, and what describes the model and the data of a file.

    Raises:
        UserError: no such file, no .npz archive of plain numbers, a key missing, an array of another shape.
    """
    arrays = _read_archive(path)
    missing = [name for name in (*names, *_SHAPE) if name not in arrays]
    if missing:
        raise UserError(
            f"expected a saliency file with {', '.join((*names, *_SHAPE))}, got one without {', '.join(missing)}; "
            "write one with `fedgraft saliency collect`"
        )
    shape = tuple(_whole(name, arrays[name]) for name in _SHAPE)
    for name in names:
        if arrays[name].shape != shape:
            raise UserError(
                f"expected {name} of shape {shape} ({', '.join(_SHAPE)}), got {arrays[name].shape}"
            )
    return {
        **{name: arrays[name] for name in names},
        "decoder_layers": _whole_list("decoder_layers", arrays.get("decoder_layers", np.arange(shape[0]))),
        "num_shared": tuple(_whole_list("num_shared", arrays.get("num_shared", np.arange(0)))),
        "provenance": _provenance(arrays.get("provenance", np.asarray("{}"))),
    }


def _read_archive(path: Path) -> dict[str, np.ndarray]:
    try:
        # Unpickling would execute code.
        with np.load(path, allow_pickle=False) as archive:
            return {name: archive[name] for name in archive.files}
    except FileNotFoundError:
        raise UserError("expected a saliency file, which is not there") from None
    except _UNREADABLE:
        raise UserError("expected a saliency file (.npz of plain numbers), which this is not") from None


def _whole(name: str, value: np.ndarray) -> int:
    if value.size != 1 or value.dtype.kind not in "iu":
        raise UserError(f"expected {name} to be one whole number, got {value.dtype} {value.shape}")
    return int(value.item())


def _whole_list(name: str, value: np.ndarray) -> list[int]:
    if value.dtype.kind not in "iu" or value.ndim != 1:
        raise UserError(f"expected {name} to be whole numbers, got {value.dtype} {value.shape}")
    return value.tolist()


def _provenance(value: np.ndarray) -> dict[str, Any]:
    try:
        parsed = json.loads(str(value.item()))
    except (ValueError, RecursionError):
        parsed = None
    if not isinstance(parsed, dict):
        raise UserError("expected provenance to be one JSON object")
    return parsed
