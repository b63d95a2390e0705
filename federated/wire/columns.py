"""Coding of integer columns as bytes: entropy-coded where that is smaller; reads are bounded by the caller's count."""

from __future__ import annotations

from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise

import numpy as np
from pcodec import ChunkConfig, DeltaSpec, ModeSpec, PagingSpec
from pcodec.standalone import simple_compress, simple_decompress_into
from zstandard import ZstdCompressor, ZstdDecompressor, frame_content_size

from federated.updates.update import RefusedUpdate

# The first byte of a column: raw values, a zstandard frame of those, or the bytes of the integers that pcodec holds.
_RAW, _ZSTD, _INTEGER_BYTES = 0, 3, (1, 2, 4, 8)
# Integers that share a table of pcodec, and a thread: a table costs bytes, and runs are much alike from end to end.
_PART, _THREADS = 1 << 19, 2
_LENGTH = np.dtype("<u4")
# Up to here pcodec is also tried for columns of few bits: a few per cent smaller than Huffman codes of whole bytes, but
# ten times slower.
_FEW = 1 << 16


def pack_column(values: np.ndarray, *, width: int) -> bytes:
    """Pack unsigned integers [n] below ``2**width``: raw, with zstandard or with pcodec, whichever is smallest.

    ``width``: 2, 4, 8, 16, 32 or 64 bits. The first byte names the coding. The same values give the same bytes.
    """
    candidates = []
    if width < 8:
        candidates.append(bytes([_ZSTD]) + zstd_pack(_pack_raw(values, width)))
    if width >= 8 or values.size <= _FEW:
        candidates.append(_pack_parts(values))
    smallest = min(candidates, key=len)
    if len(smallest) <= -(-values.size * width // 8):
        return smallest
    return bytes([_RAW]) + _pack_raw(values, width)


def unpack_column(data: bytes, *, dtype: np.dtype, count: int, width: int, widen: bool = True) -> np.ndarray:
    """Decode exactly ``count`` values of ``dtype`` below ``2**width``; RefusedUpdate for other contents.

    Allocates ``count`` values, at most twice. ``widen``: False returns the unsigned type of the coding where that is
    narrower than ``dtype``.
    """
    dtype = np.dtype(dtype)
    coding, payload = data[0] if data else -1, data[1:]
    if coding == _ZSTD and width < 8:
        coding, payload = _RAW, zstd_unpack(payload, size=-(-count * width // 8))
    if coding == _RAW:
        return _unpack_raw(payload, dtype, count, width)
    if coding not in _INTEGER_BYTES or coding > dtype.itemsize:
        raise RefusedUpdate(f"unknown column coding {coding}")
    values = np.zeros(count, dtype=f"u{coding}")
    _unpack_parts(payload, values)
    if width < 8 and count and int(values.max()) >= 2**width:
        raise RefusedUpdate(f"expected values below {2 ** width}")
    return values.astype(dtype, copy=False) if widen else values


def zstd_pack(data: bytes) -> bytes:
    """Compress bytes to a zstandard frame that states its content size.

    Masks and codes have few repeated sequences, so that the fast level, mostly Huffman coding, is enough.
    """
    return ZstdCompressor(level=1, write_content_size=True).compress(data)


def zstd_unpack(data: bytes, *, size: int) -> bytes:
    """Decompress a frame to exactly ``size`` bytes; RefusedUpdate for a frame that states or holds another size."""
    try:
        # The stated size is what the decoder would allocate, so it is checked first.
        if frame_content_size(data) == size:
            content = ZstdDecompressor().decompress(data, allow_extra_data=False)
            if len(content) == size:
                return content
    except Exception as error:
        raise RefusedUpdate(f"a zstandard frame does not decode: {error}") from error
    raise RefusedUpdate(f"expected a zstandard frame of {size} bytes")


def _pack_parts(values: np.ndarray) -> bytes:
    """Integer size in bytes, the lengths of all parts but the last, and the coded parts."""
    narrow = values.astype(np.min_scalar_type(int(values.max()) if values.size else 0))
    config = ChunkConfig(
        compression_level=12,
        mode_spec=ModeSpec.classic(),
        delta_spec=DeltaSpec.no_op(),
        paging_spec=PagingSpec.equal_pages_up_to(_PART),
        enable_8_bit=True,
    )
    parts = _in_threads(lambda part: simple_compress(part, config), _parts(narrow))
    lengths = np.array([len(part) for part in parts[:-1]], dtype=_LENGTH)
    return bytes([narrow.itemsize]) + lengths.tobytes() + b"".join(parts)


def _unpack_parts(payload: bytes, values: np.ndarray) -> None:
    """Fill ``values`` from what ``_pack_parts`` wrote after its first byte."""
    parts = _parts(values)
    first = (len(parts) - 1) * _LENGTH.itemsize
    if len(payload) < first:
        raise RefusedUpdate(f"expected a column of {len(parts)} parts")
    lengths = np.frombuffer(payload[:first], dtype=_LENGTH).astype(np.int64)
    ends = [first, *(first + np.cumsum(lengths)).tolist(), len(payload)]
    coded = [payload[start:end] for start, end in pairwise(ends)]
    for part, place in zip(coded, parts, strict=True):
        _decompress_into(part, place)


def _parts(values: np.ndarray) -> list[np.ndarray]:
    """Consecutive views of at most ``_PART`` values, of the same length to one; one where there is no value."""
    return np.array_split(values, max(1, -(-values.size // _PART)))


def _in_threads(run: Callable[[np.ndarray], bytes], items: list[np.ndarray]) -> list[bytes]:
    """Map ``run`` over ``items`` in threads: coding takes six times as long as decoding and releases the GIL."""
    if len(items) == 1:
        return [run(items[0])]
    with ThreadPoolExecutor(_THREADS) as pool:
        return list(pool.map(run, items))


def _decompress_into(payload: bytes, values: np.ndarray) -> None:
    """Fill ``values`` with a part that holds exactly as many."""
    try:
        progress = simple_decompress_into(payload, values)
    except Exception as error:
        raise RefusedUpdate(f"a column does not decode: {error}") from error
    except BaseException as error:
        # A panic of the native decoder is a BaseException; all others (Ctrl-C) pass.
        if type(error).__name__ != "PanicException":
            raise
        raise RefusedUpdate("a column does not decode") from error
    if not progress.finished or progress.n_processed != values.size:
        raise RefusedUpdate(f"expected a part of {values.size} values")


def _pack_raw(values: np.ndarray, width: int) -> bytes:
    if width >= 8:
        return values.astype(f"<u{width // 8}").tobytes()
    per_byte = 8 // width
    packed = np.zeros(-(-values.size // per_byte), dtype=np.uint8)
    for place in range(per_byte):
        part = values[place::per_byte].astype(np.uint8, copy=False)
        packed[: part.size] |= part << np.uint8(place * width)
    return packed.tobytes()


def _unpack_raw(payload: bytes, dtype: np.dtype, count: int, width: int) -> np.ndarray:
    if len(payload) != -(-count * width // 8):
        raise RefusedUpdate(f"expected a column of {count} values")
    if width >= 8:
        return np.frombuffer(payload, dtype=f"<u{width // 8}").astype(dtype)
    per_byte, packed = 8 // width, np.frombuffer(payload, dtype=np.uint8)
    unpacked = np.empty((packed.size, per_byte), dtype=dtype)
    for place in range(per_byte):
        unpacked[:, place] = (packed >> np.uint8(place * width)) & np.uint8(2**width - 1)
    return unpacked.reshape(-1)[:count]
