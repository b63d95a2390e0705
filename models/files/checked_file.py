"""Safetensors files with a checksum over all contents; a damaged file is treated as absent.

Files may be written and read one tensor at a time, so that a whole file is never in memory.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable, Iterable, Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from configs.errors import UserError
from configs.output import replacing, write_bytes
from models.files.safetensors_files import StoredTensor, read_stored, stored_tensors

# Names of the dtypes that ``write_in_turn`` supports.
_DTYPES = {torch.float32: "F32", torch.uint8: "U8"}
# Bytes reserved at the start of a file for its header, which is known only after all tensors are written.
_HEADER, _HEADER_ENTRY = 1024, 128


def write_checked(
    path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str], *, durable: bool = True
) -> None:
    """Write tensors and metadata atomically; ``durable`` as ``configs.output.replacing``."""
    whole = {name: value.contiguous() for name, value in tensors.items()}
    data = save(whole, metadata={**metadata, "checksum": _checksum(whole, metadata)})
    write_bytes(path, data, durable=durable)


def read_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a file; None for a missing or damaged one."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (FileNotFoundError, SafetensorError):
        return None
    checksum = metadata.pop("checksum", "")
    return (tensors, metadata) if checksum == _checksum(tensors, metadata) else None


def write_in_turn(
    path: Path, names: Iterable[str], read: Callable[[str], Tensor], metadata: Mapping[str, str]
) -> None:
    """Write the tensors ``read(name)``, float32 or uint8, one at a time; the file appears atomically.

    All-zero tensors are left out.

    Args:
        path: path of the file.
        names: names of the tensors, ASCII, each at most 40 characters.
        read: tensor of a name; called once per name, in sorted order.
        metadata: metadata of the file.
    """
    names = sorted(names)
    room = _HEADER + _HEADER_ENTRY * len(names) + 8 * -(-len(json.dumps(dict(metadata))) // 8)
    digest, entries, offset = _Digest(metadata), {}, 0
    with replacing(path) as file:
        file.seek(8 + room)
        for name in names:
            tensor = read(name).contiguous()
            if not tensor.any():
                continue
            data = tensor.view(torch.uint8).numpy()
            file.write(data.data)
            digest.add(name, tensor)
            ends = [offset, offset + data.nbytes]
            entries[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": ends,
            }
            offset += data.nbytes
        header = json.dumps({"__metadata__": {**metadata, "checksum": digest.hexdigest()}, **entries})
        if len(header) > room:
            raise ValueError(f"expected a header of at most {room} bytes, got {len(header)}")
        file.seek(0)
        file.write(room.to_bytes(8, "little") + header.ljust(room).encode())


def check_in_turn(path: Path) -> tuple[dict[str, StoredTensor], dict[str, str]] | None:
    """Headers of the tensors, for ``read_stored``, and metadata of a file; None for a missing or damaged one.

    The contents are verified tensor by tensor.
    """
    try:
        with safe_open(path, framework="pt") as file:
            metadata = dict(file.metadata() or {})
        checksum = metadata.pop("checksum", "")
        digest, stored = _Digest(metadata), {tensor.name: tensor for tensor in stored_tensors(path)}
        for name in sorted(stored):
            digest.add(name, read_stored(stored[name]))
    except (FileNotFoundError, SafetensorError, UserError):
        return None
    return (stored, metadata) if checksum == digest.hexdigest() else None


def bytes_tensor(data: bytes) -> Tensor:
    """Bytes as a tensor, uint8 ``[N]``."""
    return torch.frombuffer(bytearray(data), dtype=torch.uint8) if data else torch.empty(0, dtype=torch.uint8)


def tensor_bytes(tensor: Tensor) -> bytes:
    """Undo ``bytes_tensor``."""
    return tensor.numpy().tobytes()


class _Digest:
    """BLAKE2b digest of the contents of a file; safetensors itself has no checksum."""

    def __init__(self, metadata: Mapping[str, str]) -> None:
        head = json.dumps(sorted(metadata.items())).encode()
        self._digest = hashlib.blake2b(head, digest_size=16)

    def add(self, name: str, tensor: Tensor) -> None:
        """Add a tensor; tensors are added in the order of their names."""
        self._digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        self._digest.update(tensor.reshape(-1).view(torch.uint8).numpy() if tensor.numel() else b"")

    def hexdigest(self) -> str:
        return self._digest.hexdigest()


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    digest = _Digest(metadata)
    for name, tensor in sorted(tensors.items()):
        digest.add(name, tensor)
    return digest.hexdigest()
