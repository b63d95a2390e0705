"""Checkpoint of a model whose experts were merged in memory."""

from __future__ import annotations

from pathlib import Path

from transformers import PreTrainedModel

from configs.output import new_directory
from models.checkpoints.load import load_tokenizer
from models.checkpoints.save import save_graph
from models.families.table import family_of
from models.files.side_files import copy_side_files


def save_merged(
    model: PreTrainedModel, source: Path, out: Path, *, graph_version: int, overwrite: bool
) -> None:
    """Write a model with the side files of its source checkpoint.

    Args:
        model: model with equally many experts per layer where its format holds one number.
        source: folder that the model was opened from.
        out: new folder; nothing is left there on a failure.
        graph_version: graph version after the merge, for an expert graph.
        overwrite: whether ``out`` may be replaced.
    """
    with new_directory(out, overwrite=overwrite) as directory:
        copy_side_files(source, directory)
        if family_of(model.config).has_edges:
            model.config.graph_version = graph_version
            save_graph(model, load_tokenizer(str(source)), directory)
        else:
            model.save_pretrained(directory)
