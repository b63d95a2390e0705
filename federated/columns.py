"""Integer columns <-> bytes: entropy-coded where that is smaller, bounded by the caller's count when read."""

from __future__ import annotations

import numpy as np
from pcodec import ChunkConfig, DeltaSpec, ModeSpec
from pcodec.standalone import simple_compress, simple_decompress_into
from zstandard import ZstdCompressor, ZstdDecompressor, frame_content_size

from federated.update import RefusedUpdate

_RAW, _PCODEC = b"\x00", b"\x01"
_ZSTD_LEVEL = 9


def pack_column(values: np.ndarray, *, width: int) -> bytes:
    """Pack unsigned integers [n] below ``2**width``: raw or with pcodec, whichever is smaller.

    ``width``: 2, 4, 8, 16, 32 or 64 bits. The first byte names the coding. The same values give the same bytes.
    """
    raw = _RAW + _pack_raw(values, width)
    coded = _PCODEC + simple_compress(np.ascontiguousarray(values), _pcodec_config())
    return min(raw, coded, key=len)


def unpack_column(data: bytes, *, dtype: np.dtype, count: int, width: int) -> np.ndarray:
    """Return exactly ``count`` values of ``dtype`` below ``2**width``.

    Allocates ``count`` values and no more; anything that does not decode to them raises RefusedUpdate.
    """
    method, payload = data[:1], data[1:]
    if method == _RAW:
        return _unpack_raw(payload, np.dtype(dtype), count, width)
    if method != _PCODEC:
        raise RefusedUpdate(f"unknown column coding {method.hex() or 'none'}")
    values = np.zeros(count, dtype=dtype)
    if _decompress_into(payload, values) != count:
        raise RefusedUpdate(f"expected a column of {count} values")
    if width < 8 and count and int(values.max()) >= 2**width:
        raise RefusedUpdate(f"expected values below {2 ** width}")
    return values


def zstd_pack(data: bytes) -> bytes:
    """Compress bytes; the frame states its content size."""
    return ZstdCompressor(level=_ZSTD_LEVEL, write_content_size=True).compress(data)


def zstd_unpack(data: bytes, *, size: int) -> bytes:
    """Return exactly ``size`` bytes; a frame that states or holds another size raises RefusedUpdate."""
    try:
        # The stated size is what the decoder would allocate, so it is checked first.
        if frame_content_size(data) == size:
            content = ZstdDecompressor().decompress(data, allow_extra_data=False)
            if len(content) == size:
                return content
    except Exception as error:
        raise RefusedUpdate(f"a zstandard frame does not decode: {error}") from error
    raise RefusedUpdate(f"expected a zstandard frame of {size} bytes")


def _pcodec_config() -> ChunkConfig:
    return ChunkConfig(
        compression_level=12, mode_spec=ModeSpec.classic(), delta_spec=DeltaSpec.no_op(), enable_8_bit=True
    )


def _decompress_into(payload: bytes, values: np.ndarray) -> int:
    """Fill ``values`` and return how many the payload held, -1 when it held more."""
    try:
        progress = simple_decompress_into(payload, values)
    except Exception as error:
        raise RefusedUpdate(f"a column does not decode: {error}") from error
    except BaseException as error:
        # A panic inside the native decoder is no Exception; every other one (Ctrl-C) must pass.
        if type(error).__name__ != "PanicException":
            raise
        raise RefusedUpdate("a column does not decode") from error
    return progress.n_processed if progress.finished else -1


def _pack_raw(values: np.ndarray, width: int) -> bytes:
    if width >= 8:
        return values.astype(f"<u{width // 8}").tobytes()
    per_byte = 8 // width
    padded = np.zeros(-(-values.size // per_byte) * per_byte, dtype=np.uint8)
    padded[: values.size] = values
    shifts = np.arange(per_byte, dtype=np.uint8) * width
    return np.bitwise_or.reduce(padded.reshape(-1, per_byte) << shifts, axis=1).astype(np.uint8).tobytes()


def _unpack_raw(payload: bytes, dtype: np.dtype, count: int, width: int) -> np.ndarray:
    if len(payload) != -(-count * width // 8):
        raise RefusedUpdate(f"expected a column of {count} values")
    if width >= 8:
        return np.frombuffer(payload, dtype=f"<u{width // 8}").astype(dtype)
    shifts = np.arange(8 // width, dtype=np.uint8) * width
    unpacked = (np.frombuffer(payload, dtype=np.uint8)[:, None] >> shifts) & (2**width - 1)
    return unpacked.reshape(-1)[:count].astype(dtype)
