"""Quantization of values: fp16, int8 and int4 with block scales, 2-bit bin means.

Quantization is idempotent: dequantized values quantize to themselves, so that a client can compute its quantization
error first and pack the result later without further loss.

All magnitudes are relative to one power of two for the whole column, so that changes of 1e-6 keep the precision of
changes of 1. Block scales are small floats (uint8: 4 mantissa bits, uint16: 10), zero or
at most ``OCTAVES`` octaves below the largest scale.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from federated.updates.update import RefusedUpdate, SparseUpdate, join_values, replace_values

VALUE_BITS = (2, 4, 8, 16)
BLOCK = {2: 256, 4: 64, 8: 64}
LEVELS = {4: 7, 8: 127}
MANTISSA = {2: 4, 4: 4, 8: 10}
OCTAVES = 15
MIN_EXPONENT, MAX_EXPONENT = -100, 41
# Far above any change of a weight, and so low that the squares of 2**47 such values still add up in float32.
MAX_MAGNITUDE = 2.0**40


@dataclass(frozen=True)
class QuantizedColumn:
    """``bits`` a value; ``codes``: uint8 (uint16 at 16 bits) [count]; ``scales``: uint8 or uint16, one a
    block (two at 2 bits, none at 16); ``exponent``: the column's power of two."""

    bits: int
    codes: np.ndarray
    scales: np.ndarray
    exponent: int


def scale_count(count: int, bits: int) -> int:
    """Number of block scales of ``count`` values of ``bits`` bits."""
    return 0 if bits == 16 else -(-count // BLOCK[bits]) * (2 if bits == 2 else 1)


def quantize(values: np.ndarray, bits: int) -> QuantizedColumn:
    """Quantize a float column [count] to ``bits`` bits (2, 4, 8 or 16).

    Raises RefusedUpdate for a NaN, an infinity or a magnitude above 2**40; ValueError for other bits.
    """
    if bits not in VALUE_BITS:
        raise ValueError(f"expected value bits in {VALUE_BITS}, got {bits}")
    # A magnitude above the range of float32 becomes an infinity, which is refused.
    with np.errstate(over="ignore"):
        column = np.asarray(values).astype(np.float32, copy=False)
    magnitudes = np.abs(column)
    _check_bound(magnitudes)
    if not column.size:
        codes = np.zeros(0, dtype=np.uint16 if bits == 16 else np.uint8)
        return QuantizedColumn(bits, codes, np.zeros(0, dtype=_scale_dtype(bits)), 0)
    if bits == 16:
        return _quantize_half(column, magnitudes)
    quantizer = _quantize_bins if bits == 2 else _quantize_levels
    return quantizer(column, magnitudes, bits)


def dequantize(column: QuantizedColumn) -> np.ndarray:
    """Float32 values [count] of a quantized column, finite and of magnitude at most 2**40.

    RefusedUpdate for codes or scales that no quantizer writes.
    """
    if column.scales.size != scale_count(column.codes.size, column.bits):
        raise RefusedUpdate(f"expected one scale a block, got {column.scales.size}")
    if not MIN_EXPONENT <= column.exponent <= MAX_EXPONENT:
        raise RefusedUpdate(f"exponent {column.exponent} out of range")
    if column.bits == 16:
        values = _half_values(column)
        _check_bound(np.abs(values))
        return values
    scales = _decode_scales(column.scales, column.exponent, column.bits)
    _check_bound(scales * np.float32(LEVELS.get(column.bits, 1)))
    return _bin_values(column, scales) if column.bits == 2 else _level_values(column, scales)


def quantize_update(update: SparseUpdate, bits: int) -> SparseUpdate:
    """The update with its values quantized at ``bits`` bits and dequantized, as the receiver will see them."""
    return replace_values(update, dequantize(quantize(join_values(update), bits)))


def _check_bound(magnitudes: np.ndarray) -> None:
    if magnitudes.size and not magnitudes.max() <= MAX_MAGNITUDE:
        raise RefusedUpdate("expected finite values of at most 2**40, got a NaN, an infinity or more")


def _quantize_half(column: np.ndarray, magnitudes: np.ndarray) -> QuantizedColumn:
    exponent = _top_exponent(_round_mantissa(magnitudes.max(keepdims=True), 10))
    codes = (column * np.float32(2.0 ** (15 - exponent))).astype(np.float16).view(np.uint16)
    return QuantizedColumn(16, codes, np.zeros(0, dtype=np.uint8), exponent)


def _half_values(column: QuantizedColumn) -> np.ndarray:
    halves = column.codes.astype(np.uint16, copy=False).view(np.float16)
    # A NaN among the halves passes here; the bound refuses it.
    with np.errstate(invalid="ignore"):
        return halves.astype(np.float32) * np.float32(2.0 ** (column.exponent - 15))


def _quantize_levels(column: np.ndarray, magnitudes: np.ndarray, bits: int) -> QuantizedColumn:
    """Symmetric integer quantization, one scale per block; zero is stored as ``LEVELS + 1``."""
    top = LEVELS[bits]
    largest = np.maximum.reduceat(magnitudes, _starts(column.size, bits)).astype(np.float64)
    scale_codes, exponent = _encode_scales(largest / top, bits)
    scales = _decode_scales(scale_codes, exponent, bits)
    steps = column / _per_value(np.where(scales > 0, scales, np.float32(np.inf)), column.size, bits)
    np.clip(np.rint(steps, out=steps), -top, top, out=steps)
    steps += top + 1
    return QuantizedColumn(bits, steps.astype(np.uint8), scale_codes, exponent)


def _level_values(column: QuantizedColumn, scales: np.ndarray) -> np.ndarray:
    top = LEVELS[column.bits]
    if column.codes.size and (column.codes.min() < 1 or column.codes.max() > 2 * top + 1):
        raise RefusedUpdate(f"expected {column.bits}-bit codes from 1 to {2 * top + 1}")
    values = column.codes.astype(np.float32)
    values -= top + 1
    values *= _per_value(scales, values.size, column.bits)
    return values


def _quantize_bins(column: np.ndarray, magnitudes: np.ndarray, bits: int) -> QuantizedColumn:
    """2-bit quantization to a sign and one of two magnitudes: the means below and above the block's mean magnitude."""
    starts = _starts(column.size, bits)
    counts = np.diff(starts, append=column.size)
    sums = np.add.reduceat(magnitudes, starts, dtype=np.float64)
    large = magnitudes > np.repeat((sums / counts).astype(np.float32), counts)
    large_counts = np.add.reduceat(large, starts, dtype=np.int64)
    large_sums = np.add.reduceat(magnitudes * large, starts, dtype=np.float64)
    low = (sums - large_sums) / (counts - large_counts)
    high = np.where(large_counts > 0, large_sums / np.maximum(large_counts, 1), low)
    scale_codes, exponent = _encode_scales(np.stack([low, high], axis=1).reshape(-1), bits)
    codes = np.signbit(column).view(np.uint8) << np.uint8(1) | large.view(np.uint8)
    return QuantizedColumn(bits, codes, scale_codes, exponent)


def _bin_values(column: QuantizedColumn, scales: np.ndarray) -> np.ndarray:
    codes, size = column.codes, column.codes.size
    if size and codes.max() > 3:
        raise RefusedUpdate("expected 2-bit codes from 0 to 3")
    low, high = (_per_value(part.view(np.uint32), size, column.bits) for part in (scales[::2], scales[1::2]))
    # Bitwise selection and sign: codes are random, so that a branch per value takes five times as long.
    chosen = np.negative(codes & np.uint8(1), dtype=np.uint32)
    chosen &= np.bitwise_xor(low, high, out=high)
    chosen ^= low
    chosen ^= (codes & np.uint8(2)).astype(np.uint32) << np.uint32(30)
    return chosen.view(np.float32)


def _starts(count: int, bits: int) -> np.ndarray:
    return np.arange(0, count, BLOCK[bits])


def _per_value(scales: np.ndarray, count: int, bits: int) -> np.ndarray:
    return np.repeat(scales, BLOCK[bits])[:count]


def _round_mantissa(magnitudes: np.ndarray, bits: int) -> np.ndarray:
    fraction, exponent = np.frexp(magnitudes)
    return np.ldexp(np.rint(np.ldexp(fraction, bits + 1)), exponent - bits - 1)


def _top_exponent(magnitudes: np.ndarray) -> int:
    """Exponent e with ``max < 2**e <= 2 * max``, clipped to the range of float32."""
    top = float(magnitudes.max()) if magnitudes.size else 0.0
    return int(np.clip(np.frexp(top)[1], MIN_EXPONENT, MAX_EXPONENT)) if top else 0


def _encode_scales(scales: np.ndarray, bits: int) -> tuple[np.ndarray, int]:
    """Unsigned codes [n] of non-negative scales [n]: zero or ``1 + (octave, mantissa)``."""
    mantissa = MANTISSA[bits]
    rounded = _round_mantissa(scales, mantissa)
    exponent = _top_exponent(rounded)
    smallest = 2.0 ** (exponent - OCTAVES)
    rounded = np.where(rounded < smallest, np.where(scales < smallest / 2, 0.0, smallest), rounded)
    fraction, octave = np.frexp(rounded)
    codes = ((octave - exponent + OCTAVES - 1) << mantissa) + np.ldexp(fraction, mantissa + 1) - 2**mantissa
    codes = np.where(rounded > 0, codes + 1, 0)
    return codes.astype(_scale_dtype(bits)), exponent


def _scale_dtype(bits: int) -> np.dtype:
    return np.dtype(np.uint16 if bits == 8 else np.uint8)


def _decode_scales(codes: np.ndarray, exponent: int, bits: int) -> np.ndarray:
    mantissa = MANTISSA[bits]
    if codes.size and int(codes.max()) > OCTAVES << mantissa:
        raise RefusedUpdate("scale code out of range")
    steps = np.maximum(codes.astype(np.int64) - 1, 0)
    fraction = (steps & (2**mantissa - 1)) + 2**mantissa
    scales = np.ldexp(fraction.astype(np.float64), (steps >> mantissa) + exponent - OCTAVES - mantissa)
    return np.where(codes > 0, scales, 0.0).astype(np.float32)
