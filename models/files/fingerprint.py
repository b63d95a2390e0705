"""SHA-256 fingerprints of the weights of a model or of a checkpoint."""

from __future__ import annotations

import hashlib
import re
import time
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

import torch
from torch import Tensor, nn

from configs.output import write_bytes
from models.files.safetensors_files import bytes_between, checkpoint_files, stored_tensors

# Resolution of the coarsest file system clock in use (FAT).
_SETTLED_SECONDS = 2.0
_SHA256 = re.compile("[0-9a-f]{64}")


def fingerprint(model: nn.Module) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all parameters, sorted by name."""
    return fingerprint_of(sorted(model.named_parameters()))


def fingerprint_of(tensors: Iterable[tuple[str, Tensor]]) -> str:
    """``fingerprint`` of an iterable of names and parameters, sorted by name."""
    digest = hashlib.sha256()
    for name, tensor in tensors:
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.detach().cpu().contiguous().view(torch.uint8).numpy())
    return digest.hexdigest()


def checkpoint_fingerprint(source: str) -> str:
    """SHA-256 over names, shapes, dtypes and bytes of all stored tensors, sorted by name.

    It does not depend on the distribution of tensors over files. Reads 1 MiB at a time.

    Args:
        source: directory or hub id.

    Raises:
        UserError: no weights there, or a damaged file.
    """
    digest = hashlib.sha256()
    stored = [tensor for path in checkpoint_files(source) for tensor in stored_tensors(path)]
    for tensor in sorted(stored):
        digest.update(f"{tensor.name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        with tensor.path.open("rb") as file:
            for chunk in bytes_between(file, tensor.start, tensor.stop):
                digest.update(chunk)
    return digest.hexdigest()


def remembered_fingerprint(source: str, memory: Path) -> str:
    """``checkpoint_fingerprint`` with a cache on disk, keyed by path, size and modification time of the files.

    Files modified within the last ``_SETTLED_SECONDS`` are not cached: another change may have the same time.

    Args:
        source: directory or hub id.
        memory: cache directory with a small file per checkpoint, created on the first write; if it is not writable,
            checkpoints are read each time.

    Raises:
        UserError: no weights there, or a damaged file.
    """
    stats = [(str(path.resolve()), path.stat()) for path in checkpoint_files(source)]
    seen = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    note = Path(memory) / hashlib.sha256(seen.encode()).hexdigest()
    with suppress(OSError, UnicodeDecodeError):
        if _SHA256.fullmatch(known := note.read_text()):
            return known
    found = checkpoint_fingerprint(source)
    if time.time() - max(stat.st_mtime for _, stat in stats) > _SETTLED_SECONDS:
        with suppress(OSError):
            write_bytes(note, found.encode())
    return found
