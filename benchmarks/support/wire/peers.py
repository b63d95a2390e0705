"""Plain codings of updates for comparison: top-k entries with zstandard, and dense updates at reduced precision."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from flwr.app import Array, ArrayRecord
from torch import Tensor
from zstandard import ZstdCompressor, ZstdDecompressor

from benchmarks.support.statistics import alternate, median_ratio, processor_seconds
from benchmarks.support.wire.updates import kept
from federated.updates.update import (
    SparseUpdate,
    SparseVector,
    Unit,
    join_indices,
    join_values,
    split_columns,
)
from federated.wire.codec import pack_update, unpack_update

_INDEX, _VALUE = np.dtype("<i4"), np.dtype("<f2")


def plain_select(vectors: Mapping[Unit, Tensor], density: float) -> SparseUpdate:
    """Select the largest entries of each unit, a share ``density``, with torch.topk."""
    found = {}
    for unit, vector in vectors.items():
        count = round(density * vector.numel())
        positions = torch.topk(vector.abs(), count, sorted=False).indices.sort().values
        found[unit] = SparseVector(vector.numel(), positions.numpy(), vector[positions].numpy())
    return SparseUpdate(0, "", found)


def plain_pack(update: SparseUpdate, level: int = 3) -> bytes:
    """Pack int32 positions and fp16 values with zstandard."""
    columns = (join_indices(update)[0].astype(_INDEX), join_values(update).astype(_VALUE))
    return ZstdCompressor(level=level).compress(b"".join(column.tobytes() for column in columns))


def plain_unpack(data: bytes, sizes: Sequence[tuple[Unit, int]]) -> SparseUpdate:
    """Unpack the result of ``plain_pack`` for units of known ``sizes``, to the type that ``unpack_update`` returns."""
    raw = ZstdDecompressor().decompress(data)
    count = len(raw) // (_INDEX.itemsize + _VALUE.itemsize)
    indices = np.frombuffer(raw, _INDEX, count).astype(np.int64)
    values = np.frombuffer(raw, _VALUE, count, count * _INDEX.itemsize).astype(np.float32)
    return SparseUpdate(0, "", split_columns(sizes, indices, values))


def dense_peers(vectors: Mapping[Unit, Tensor], *, repeats: int) -> dict[str, dict[str, float | str]]:
    """Bytes per entry and seconds of each coding of all entries of ``vectors``."""
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


def speed_figures(
    vectors: Mapping[Unit, Tensor], *, density: float, bits: int, repeats: int
) -> dict[str, Any]:
    """Speed and size of our codec relative to plain coding.

    Args:
        vectors: dense change of each unit.
        density: share of entries that is kept.
        bits: bits per value of our codec.
        repeats: repetitions of each timing.

    Returns:
        ``figures``: ratios of seconds, plain over ours, and of bytes, ours over plain; ``peers``: the absolute numbers.
    """
    update = kept(vectors, density)
    sizes = {unit: vector.numel() for unit, vector in vectors.items()}
    ours, plain = pack_update(update, value_bits=bits), plain_pack(update)
    seconds = alternate(
        {
            "ours, select": lambda: kept(vectors, density),
            "plain, select": lambda: plain_select(vectors, density),
            "ours, pack": lambda: pack_update(update, value_bits=bits),
            "plain, pack": lambda: plain_pack(update),
            "ours, unpack": lambda: unpack_update(ours, sizes=sizes),
            "plain, unpack": lambda: plain_unpack(plain, sorted(sizes.items())),
        },
        repeats=repeats,
        warmup=1,
    )
    entries = sum(sizes.values())
    sizes_per_entry = {"ours": len(ours) / entries, "plain": len(plain) / entries}
    codings = {
        "ours": f"ours at density {density}, int{bits}",
        "plain": f"int32 fp16 zstd -3 at density {density}",
    }
    processor = {
        name: processor_seconds(pack, repeats)
        for name, pack in (
            ("ours", lambda: pack_update(update, value_bits=bits)),
            ("plain", lambda: plain_pack(update)),
        )
    }
    return {
        "figures": {**_speed_ratios(seconds), "size_ratio": len(ours) / len(plain)},
        "peers": _speed_peers(seconds, processor, sizes_per_entry, codings),
    }


def _speed_ratios(seconds: Mapping[str, Sequence[float]]) -> dict[str, float]:
    """Median ratios of the seconds of plain coding over ours, with each selection of entries and without."""
    whole = {
        f"{packer}, {selector}": np.add(seconds[f"{selector}, select"], seconds[f"{packer}, pack"]).tolist()
        for packer, selector in (("ours", "ours"), ("plain", "ours"), ("plain", "plain"))
    }
    return {
        "pack_speed_ratio": median_ratio(whole["plain, plain"], whole["ours, ours"]),
        "pack_speed_ratio_same_selection": median_ratio(whole["plain, ours"], whole["ours, ours"]),
        "pack_speed_ratio_without_selection": median_ratio(seconds["plain, pack"], seconds["ours, pack"]),
        "unpack_speed_ratio": median_ratio(seconds["plain, unpack"], seconds["ours, unpack"]),
    }


def _speed_peers(
    seconds: Mapping[str, Sequence[float]],
    processor: Mapping[str, float],
    bytes_per_entry: Mapping[str, float],
    codings: Mapping[str, str],
) -> dict[str, Any]:
    """Median seconds and bytes per entry of our codec and of plain coding."""
    selections = {"ours": "ours", "torch.topk": "plain"}
    return {
        f"selection of the largest entries, {label}": {
            "seconds": statistics.median(seconds[f"{name}, select"])
        }
        for label, name in selections.items()
    } | {
        label: {
            "bytes_per_entry": bytes_per_entry[name],
            "seconds": statistics.median(seconds[f"{name}, pack"]),
            "processor_seconds": processor[name],
            "unpack_seconds": statistics.median(seconds[f"{name}, unpack"]),
        }
        for name, label in codings.items()
    }


def _record_bytes(vectors: Mapping[Unit, Tensor], dtype: type) -> int:
    arrays = {str(unit): Array(vector.numpy().astype(dtype)) for unit, vector in vectors.items()}
    return sum(len(array.data) for array in ArrayRecord(arrays).values())


def _four_bit_bytes(quantizer, column: Tensor) -> int:
    codes, state = quantizer.quantize_4bit(column, blocksize=64, quant_type="nf4", compress_statistics=True)
    scales = state.absmax.numel() * state.absmax.element_size()
    nested = state.state2.absmax.numel() * state.state2.absmax.element_size() if state.nested else 0
    return codes.numel() * codes.element_size() + scales + nested
