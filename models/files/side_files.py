"""Files of a checkpoint other than weights and configuration: tokenizer, templates, code."""

from __future__ import annotations

import shutil
from pathlib import Path

from huggingface_hub import snapshot_download

from configs.errors import UserError, first_line
from models.files.safetensors_files import checkpoint_files

# File patterns of weights in any format.
WEIGHTS = ("*.safetensors", "*.bin", "*.pt", "*.pth", "*.ckpt", "*.gguf", "*.h5", "*.msgpack", "*.onnx*")
_OTHER_FORMATS = [pattern for pattern in WEIGHTS if pattern != "*.safetensors"]


def local_checkpoint(source: str) -> Path:
    """Local directory of a checkpoint; a hub id that is not cached is downloaded.

    Raises:
        UserError: no such folder or hub id, or no safetensors weights in it.
    """
    if Path(source).is_dir():
        return Path(source)
    for local_only in (True, False):
        try:
            folder = snapshot_download(source, local_files_only=local_only, ignore_patterns=_OTHER_FORMATS)
            checkpoint_files(folder)
            return Path(folder)
        except (OSError, ValueError, UserError) as error:
            problem = error
    raise UserError(
        f"expected a checkpoint folder or a hub id, got {source}: {first_line(problem)}"
    ) from problem


def copy_side_files(source: Path, out: Path) -> None:
    """Copy all files except weights, ``config.json``, hidden files and nested checkpoints.

    The recipe of a bootstrapped graph counts as weights, because it describes only that graph.
    """
    skip = shutil.ignore_patterns(*WEIGHTS, *(f"{pattern}.index.json" for pattern in WEIGHTS), ".*")

    def skipped(folder: str, names: list[str]) -> set[str]:
        inner = {name for name in names if (Path(folder) / name / "config.json").is_file()}
        own = {"config.json"} if Path(folder) == source else set()
        return set(skip(folder, names)) | inner | own

    shutil.copytree(source, out, ignore=skipped, dirs_exist_ok=True)
