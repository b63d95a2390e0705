"""What others send: the largest entries with plain coding, and whole updates in fewer bits."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor
from zstandard import ZstdCompressor, ZstdDecompressor

from benchmarks.support.statistics import alternate
from federated.updates.update import (
    SparseUpdate,
    SparseVector,
    Unit,
    join_indices,
    join_values,
    split_columns,
)

_INDEX, _VALUE = np.dtype("<i4"), np.dtype("<f2")


def plain_select(vectors: Mapping[Unit, Tensor], density: float) -> SparseUpdate:
    """A share ``density`` of each unit's entries, the largest, as torch.topk finds them."""
    found = {}
    for unit, vector in vectors.items():
        count = round(density * vector.numel())
        positions = torch.topk(vector.abs(), count, sorted=False).indices.sort().values
        found[unit] = SparseVector(vector.numel(), positions.numpy(), vector[positions].numpy())
    return SparseUpdate(0, "", found)


def plain_pack(update: SparseUpdate, level: int = 3) -> bytes:
    """Positions in int32 and values in fp16, with zstandard."""
    columns = (join_indices(update)[0].astype(_INDEX), join_values(update).astype(_VALUE))
    return ZstdCompressor(level=level).compress(b"".join(column.tobytes() for column in columns))


def plain_unpack(data: bytes, sizes: Sequence[tuple[Unit, int]]) -> SparseUpdate:
    """Undo ``plain_pack`` for units of known ``sizes``: the same kind of update that ours unpacks to."""
    raw = ZstdDecompressor().decompress(data)
    count = len(raw) // (_INDEX.itemsize + _VALUE.itemsize)
    indices = np.frombuffer(raw, _INDEX, count).astype(np.int64)
    values = np.frombuffer(raw, _VALUE, count, count * _INDEX.itemsize).astype(np.float32)
    return SparseUpdate(0, "", split_columns(sizes, indices, values))


def dense_peers(vectors: Mapping[Unit, Tensor], *, repeats: int) -> dict[str, dict[str, float | str]]:
    """Bytes an entry and seconds of each way to send every entry of ``vectors``."""
    column = torch.cat([vectors[unit] for unit in sorted(vectors)])
    ways: dict[str, Callable[[], int]] = {
        "flower fp32": lambda: _record_bytes(vectors, np.float32),
        "flower fp16": lambda: _record_bytes(vectors, np.float16),
        "bf16 zstd -3": lambda: len(
            ZstdCompressor(level=3).compress(column.bfloat16().view(torch.int16).numpy().tobytes())
        ),
    }
    absent: dict[str, dict[str, float | str]] = {}
    try:
        import bitsandbytes.functional as quantizer

        ways["bitsandbytes nf4"] = lambda: _four_bit_bytes(quantizer, column)
    except ImportError as error:
        absent["bitsandbytes nf4"] = {"absent": str(error)}
    seconds = alternate(ways, repeats=repeats)
    return absent | {
        name: {"bytes_per_entry": way() / column.numel(), "seconds": statistics.median(seconds[name])}
        for name, way in ways.items()
    }


def _record_bytes(vectors: Mapping[Unit, Tensor], dtype: type) -> int:
    arrays = {str(unit): Array(vector.numpy().astype(dtype)) for unit, vector in vectors.items()}
    return sum(len(array.data) for array in ArrayRecord(arrays).values())


def _four_bit_bytes(quantizer, column: Tensor) -> int:
    codes, state = quantizer.quantize_4bit(column, blocksize=64, quant_type="nf4", compress_statistics=True)
    scales = state.absmax.numel() * state.absmax.element_size()
    nested = state.state2.absmax.numel() * state.state2.absmax.element_size() if state.nested else 0
    return codes.numel() * codes.element_size() + scales + nested
