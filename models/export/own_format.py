"""Export of a mixture of experts to the format that it already has: a checked copy."""

from __future__ import annotations

import shutil
from pathlib import Path

from transformers import PreTrainedConfig

from configs.choices import ExportFormat
from configs.errors import UserError
from models.export.mixture_format import FORMATS
from models.families.table import FAMILIES
from models.files.safetensors_files import check_file, checkpoint_files
from models.files.side_files import copy_side_files
from models.moe_files.layout import read_moe_layout


def check_own_format(config: PreTrainedConfig, to: ExportFormat, source: str) -> None:
    """Check that a model that is no expert graph has the format of an export.

    Raises:
        UserError: names its type.
    """
    form = FORMATS.get(to)
    family = FAMILIES.get(config.model_type)
    if form is None or family is None or family is not FAMILIES[form.config.model_type]:
        wanted = f" or a model of type {form.config.model_type!r}" if form else ""
        raise UserError(
            f"expected an expert graph{wanted}, got a model of type {config.model_type!r} in {source}; only graphs "
            "change their format: make one with `fedgraft bootstrap --model DIR --experts E --out DIR`"
        )


def copy_checkpoint(source: Path, out: Path) -> None:
    """Copy weights, configuration and side files of a mixture of experts into an existing directory.

    Args:
        source: folder of the checkpoint.
        out: receives the files.

    Raises:
        UserError: as ``read_moe_layout``, or a damaged weight file.
    """
    read_moe_layout(source)
    files = checkpoint_files(str(source))
    for file in files:
        check_file(file)
    copy_side_files(source, out)
    names = [file.name for file in files] + ["config.json"]
    indices = [path.name for path in source.glob("*.safetensors.index.json")]
    for name in names + indices:
        shutil.copyfile(source / name, out / name)
