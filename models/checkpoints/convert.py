"""Conversion of GGUF files and ``.bin`` checkpoints to safetensors checkpoints, once, in the user-cache folder."""

from __future__ import annotations

import hashlib
import importlib.util
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from typing import NamedTuple

import torch
from filelock import FileLock
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME, WEIGHTS_INDEX_NAME, WEIGHTS_NAME

from configs.errors import UserError, first_line
from configs.output import new_directory
from configs.paths import cache_folder
from models.checkpoints.save import save_checkpoint
from models.files.tied_head import record_own_head

_GGUF = ".gguf"
Opened = tuple[PreTrainedModel, PreTrainedTokenizerBase]


def as_checkpoint(source: str) -> str:
    """Return the path of a safetensors checkpoint with the weights of ``source``.

    A GGUF file, a folder with one GGUF file and no ``config.json``, and a folder whose only weights are ``.bin`` files
    are converted into the user-cache folder when their files are new or have changed. Every other source, e.g. a hub
    id, is returned as it is.

    Args:
        source: path or hub id.

    Raises:
        UserError: a file that cannot be read, an unknown architecture, or the package ``gguf`` is missing.
    """
    found = _foreign(Path(source).expanduser())
    if found is None:
        return source
    stats = [(str(file.resolve()), file.stat()) for file in found.files]
    seen = "\n".join(f"{path} {stat.st_size} {stat.st_mtime_ns}" for path, stat in stats)
    folder = cache_folder() / "converted"
    target = folder / f"{found.path.stem}-{hashlib.sha256(seen.encode()).hexdigest()[:16]}"
    folder.mkdir(parents=True, exist_ok=True)
    with FileLock(folder / f"{target.name}.lock"):
        if not (target / "config.json").is_file():
            _write(found, target)
    return str(target)


def convert(source: str, out: Path) -> None:
    """Write the weights and the tokenizer of a GGUF file or a ``.bin`` checkpoint as a safetensors checkpoint.

    Args:
        source: path, as for ``as_checkpoint``.
        out: new directory.

    Raises:
        UserError: as ``as_checkpoint``; neither GGUF nor ``.bin``; an output directory that is not empty.
    """
    found = _foreign(Path(source).expanduser())
    if found is None:
        raise UserError(f"expected a GGUF file or a folder with .bin weights, got {source}")
    _write(found, out)


class _Foreign(NamedTuple):
    """A source that is no safetensors checkpoint: its path, its weight files, and the function that opens it."""

    path: Path
    files: list[Path]
    open: Callable[[Path], Opened]


def _foreign(path: Path) -> _Foreign | None:
    if file := _gguf_file(path):
        return _Foreign(file, [file], _open_gguf)
    if files := _bin_files(path):
        return _Foreign(path, files, _open_bin)
    return None


def _write(found: _Foreign, out: Path) -> None:
    model, tokenizer = found.open(found.path)
    record_own_head(model)
    size = sum(value.nbytes for value in model.parameters())
    with new_directory(out, size=size) as directory:
        save_checkpoint(model, tokenizer, directory)


def _gguf_file(path: Path) -> Path | None:
    if path.is_file():
        return path if path.suffix.lower() == _GGUF else None
    if not path.is_dir() or (path / "config.json").exists():
        return None
    found = [each for each in sorted(path.iterdir()) if each.suffix.lower() == _GGUF]
    if len(found) > 1:
        raise UserError(
            f"expected one GGUF file in {path}, got {len(found)}; name one of them, e.g. {found[0].name}"
        )
    return found[0] if found else None


def _bin_files(path: Path) -> list[Path]:
    """The ``.bin`` weight files of a folder without safetensors weights."""
    if any((path / name).exists() for name in (SAFE_WEIGHTS_NAME, SAFE_WEIGHTS_INDEX_NAME)):
        return []
    if not any((path / name).exists() for name in (WEIGHTS_NAME, WEIGHTS_INDEX_NAME)):
        return []
    return sorted(path.glob("pytorch_model*.bin*"))


def _open_gguf(file: Path) -> Opened:
    if importlib.util.find_spec("gguf") is None:
        raise UserError(
            f"expected the package gguf to read {file}, found none; install it: bash scripts/install.sh gguf"
        )
    from transformers import GgufConfig

    folder, name = str(file.parent), file.name
    try:
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=name)
        model = AutoModelForCausalLM.from_pretrained(
            folder, gguf_file=name, dtype=_gguf_dtype(file), quantization_config=GgufConfig(dequantize=True)
        )
    except Exception as error:  # noqa: BLE001 - the tokenizers library raises Exception itself
        raise UserError(
            f"expected a GGUF file of a known architecture in {file}, got: {first_line(error)}"
        ) from error
    tokenizer.name_or_path = ""  # its folder holds no files of it, or those of another
    return model, tokenizer


def _gguf_dtype(file: Path) -> torch.dtype:
    """The dtype that holds the matrices of a GGUF file: fp32 and fp16 as stored, bf16 for quantized ones."""
    from gguf import GGUFReader

    kinds = Counter(tensor.tensor_type.name for tensor in GGUFReader(file).tensors if len(tensor.shape) > 1)
    stored = {"F32": torch.float32, "F16": torch.float16}
    return stored.get(kinds.most_common(1)[0][0], torch.bfloat16)


def _open_bin(folder: Path) -> Opened:
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto")
        return model, AutoTokenizer.from_pretrained(folder)
    except Exception as error:  # noqa: BLE001 - unpickling a damaged file raises almost anything
        raise UserError(
            f"expected whole .bin weights and a tokenizer in {folder}, got: {first_line(error)}"
        ) from error
