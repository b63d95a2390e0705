"""Few-bit values: fp16, int8 and int4 with block scales, 2-bit bin means.

Quantising what was dequantised gives the same values again, so a client may quantise to know its own
error and pack the result later without losing anything more.

All magnitudes are relative to one power of two for the whole column, so changes of 1e-6 keep the
precision of changes of 1. Block scales are small floats (uint8: 4 mantissa bits, uint16: 10), zero or
at most ``OCTAVES`` octaves below the largest scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from federated.update import RefusedUpdate, SparseUpdate, join_values, replace_values

VALUE_BITS = (2, 4, 8, 16)
BLOCK = {2: 256, 4: 64, 8: 64}
LEVELS = {4: 7, 8: 127}
MANTISSA = {2: 4, 4: 4, 8: 10}
OCTAVES = 15
MIN_EXPONENT, MAX_EXPONENT = -100, 101
MAX_MAGNITUDE = 2.0**100


@dataclass(frozen=True)
class QuantisedColumn:
    """``bits`` a value; ``codes``: uint8 (uint16 at 16 bits) [count]; ``scales``: uint8 or uint16, one a
    block (two at 2 bits, none at 16); ``exponent``: the column's power of two."""

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    exponent: int


def scale_count(count: int, bits: int) -> int:
    """Return how many scales ride with ``count`` values of ``bits`` bits."""
    return 0 if bits == 16 else -(-count // BLOCK[bits]) * (2 if bits == 2 else 1)


def quantise(values: np.ndarray, bits: int) -> QuantisedColumn:
    """Quantise a float column [count] to ``bits`` bits (2, 4, 8 or 16).

    Raises RefusedUpdate for a NaN, an infinity or a magnitude above 2**100; ValueError for other bits.
    """
    if bits not in VALUE_BITS:
        raise ValueError(f"expected value bits in {VALUE_BITS}, got {bits}")
    column = np.asarray(values, dtype=np.float64)
    if column.size and not np.abs(column).max() <= MAX_MAGNITUDE:
        raise RefusedUpdate("expected finite values of at most 2**100, got a NaN, an infinity or more")
    if bits == 16:
        return _quantise_half(column)
    return _quantise_bins(column) if bits == 2 else _quantise_levels(column, bits)


def dequantise(column: QuantisedColumn) -> np.ndarray:
    """Return the float32 values [count]; codes or scales that no quantiser writes raise RefusedUpdate."""
    if column.scales.size != scale_count(column.codes.size, column.bits):
        raise RefusedUpdate(f"expected one scale a block, got {column.scales.size}")
    if not MIN_EXPONENT <= column.exponent <= MAX_EXPONENT:
        raise RefusedUpdate(f"exponent {column.exponent} out of range")
    if column.bits == 16:
        return _dequantise_half(column)
    scales = _decode_scales(column.scales, column.exponent, column.bits)
    return _bin_values(column, scales) if column.bits == 2 else _level_values(column, scales)


def quantise_update(update: SparseUpdate, bits: int) -> SparseUpdate:
    """Return the update with the values that the receiver will see after packing at ``bits`` bits."""
    return replace_values(update, dequantise(quantise(join_values(update), bits)))


def _quantise_half(column: np.ndarray) -> QuantisedColumn:
    exponent = _top_exponent(_round_mantissa(np.abs(column), 10))
    codes = np.ldexp(column, 15 - exponent).astype(np.float16).view(np.uint16)
    return QuantisedColumn(16, codes, np.zeros(0, dtype=np.uint8), exponent)


def _dequantise_half(column: QuantisedColumn) -> np.ndarray:
    halves = column.codes.astype(np.uint16).view(np.float16)
    if not np.isfinite(halves).all():
        raise RefusedUpdate("expected finite values, got a NaN or an infinity")
    return np.ldexp(halves.astype(np.float64), column.exponent - 15).astype(np.float32)


def _quantise_levels(column: np.ndarray, bits: int) -> QuantisedColumn:
    """Symmetric integers, one scale a block; zero is stored as ``LEVELS + 1``."""
    top = LEVELS[bits]
    largest = np.maximum.reduceat(np.abs(column), _starts(column.size, bits)) if column.size else column
    scale_codes, exponent = _encode_scales(largest / top, bits)
    scales = _per_value(_decode_scales(scale_codes, exponent, bits), column.size, bits)
    steps = np.rint(np.divide(column, scales, out=np.zeros_like(column), where=scales > 0))
    codes = (np.clip(steps, -top, top) + top + 1).astype(np.uint8)
    return QuantisedColumn(bits, codes, scale_codes, exponent)


def _level_values(column: QuantisedColumn, scales: np.ndarray) -> np.ndarray:
    top = LEVELS[column.bits]
    if column.codes.size and (column.codes.min() < 1 or column.codes.max() > 2 * top + 1):
        raise RefusedUpdate(f"expected {column.bits}-bit codes from 1 to {2 * top + 1}")
    steps = column.codes.astype(np.float64) - top - 1
    return (steps * _per_value(scales, steps.size, column.bits)).astype(np.float32)


def _quantise_bins(column: np.ndarray) -> QuantisedColumn:
    """Sign and one of two magnitudes: the means below and above the block's mean magnitude."""
    size, starts = column.size, _starts(column.size, 2)
    if not size:
        return QuantisedColumn(2, np.zeros(0, dtype=np.uint8), np.zeros(0, dtype=np.uint8), 0)
    magnitude = np.abs(column)
    counts = np.diff(starts, append=size)
    means = np.add.reduceat(magnitude, starts) / counts
    large = magnitude > np.repeat(means, counts)
    large_count = np.add.reduceat(large.astype(np.int64), starts)
    low = np.add.reduceat(magnitude * ~large, starts) / (counts - large_count)
    high = np.add.reduceat(magnitude * large, starts) / np.maximum(large_count, 1)
    high = np.where(large_count > 0, high, low)
    scale_codes, exponent = _encode_scales(np.stack([low, high], axis=1).reshape(-1), 2)
    codes = (np.signbit(column) * 2 + large).astype(np.uint8)
    return QuantisedColumn(2, codes, scale_codes, exponent)


def _bin_values(column: QuantisedColumn, scales: np.ndarray) -> np.ndarray:
    codes = column.codes.astype(np.int64)
    if codes.size and codes.max() > 3:
        raise RefusedUpdate("expected 2-bit codes from 0 to 3")
    block = np.arange(codes.size) // BLOCK[2]
    magnitude = scales[2 * block + (codes & 1)]
    return np.where(codes >= 2, -magnitude, magnitude).astype(np.float32)


def _starts(count: int, bits: int) -> np.ndarray:
    return np.arange(0, count, BLOCK[bits])


def _per_value(scales: np.ndarray, count: int, bits: int) -> np.ndarray:
    return np.repeat(scales, BLOCK[bits])[:count]


def _round_mantissa(magnitudes: np.ndarray, bits: int) -> np.ndarray:
    fraction, exponent = np.frexp(magnitudes)
    return np.ldexp(np.rint(np.ldexp(fraction, bits + 1)), exponent - bits - 1)


def _top_exponent(magnitudes: np.ndarray) -> int:
    """Return e with ``max < 2**e <= 2 * max``, kept in the range that float32 can hold."""
    top = float(magnitudes.max()) if magnitudes.size else 0.0
    return int(np.clip(np.frexp(top)[1], MIN_EXPONENT, MAX_EXPONENT)) if top else 0


def _encode_scales(scales: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    """Return unsigned codes [n] of non-negative scales [n], zero or ``1 + (octave, mantissa)``."""
    mantissa = MANTISSA[bits]
    rounded = _round_mantissa(scales, mantissa)
    exponent = _top_exponent(rounded)
    smallest = 2.0 ** (exponent - OCTAVES)
    rounded = np.where(rounded < smallest, np.where(scales < smallest / 2, 0.0, smallest), rounded)
    fraction, octave = np.frexp(rounded)
    codes = ((octave - exponent + OCTAVES - 1) << mantissa) + np.ldexp(fraction, mantissa + 1) - 2**mantissa
    codes = np.where(rounded > 0, codes + 1, 0)
    return codes.astype(np.uint8 if mantissa == 4 else np.uint16), exponent


def _decode_scales(codes: np.ndarray, exponent: int, bits: int) -> np.ndarray:
    mantissa = MANTISSA[bits]
    if codes.size and int(codes.max()) > OCTAVES << mantissa:
        raise RefusedUpdate("scale code out of range")
    steps = np.maximum(codes.astype(np.int64) - 1, 0)
    fraction = (steps & (2**mantissa - 1)) + 2**mantissa
    scales = np.ldexp(fraction.astype(np.float64), (steps >> mantissa) + exponent - OCTAVES - mantissa)
    return np.where(codes > 0, scales, 0.0)
