"""Safetensors files with a checksum over all they hold: a changed bit counts as no file at all."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from pathlib import Path

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save
from torch import Tensor

from configs.output import write_bytes


def write_checked(path: Path, tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> None:
    """Write tensors and metadata, in one step."""
    whole = {name: value.contiguous() for name, value in tensors.items()}
    write_bytes(path, save(whole, metadata={**metadata, "checksum": _checksum(whole, metadata)}))


def read_checked(path: Path) -> tuple[dict[str, Tensor], dict[str, str]] | None:
    """Tensors and metadata of a file; None where there is none that is whole."""
    try:
        with safe_open(path, framework="pt") as file:
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
            metadata = dict(file.metadata() or {})
    except (FileNotFoundError, SafetensorError):
        return None
    checksum = metadata.pop("checksum", "")
    return (tensors, metadata) if checksum == _checksum(tensors, metadata) else None


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> str:
    """Over everything in a file: safetensors itself does not notice a changed bit."""
    digest = hashlib.blake2b(json.dumps(sorted(metadata.items())).encode(), digest_size=16)
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}\n".encode())
        digest.update(tensor.view(torch.uint8).numpy() if tensor.numel() else b"")
    return digest.hexdigest()
