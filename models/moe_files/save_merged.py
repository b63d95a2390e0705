"""Checkpoints of models whose experts were merged in memory: fit of a compression trace, writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from transformers import PreTrainedModel

from configs.errors import UserError
from configs.output import new_directory, write_json
from experts.selection.compression_trace import Step
from models.checkpoints.save import cast_weights
from models.files.side_files import copy_side_files
from models.moe.replay import check_steps
from models.moe_files.layout import MoELayout


def planned_keep_map(layout: MoELayout, steps: Sequence[Step]) -> dict[int, np.ndarray]:
    """Keep map after the steps of a compression trace, checked against the checkpoint that they are to be executed on.

    Raises:
        UserError: as ``check_steps``; different numbers of experts per layer in a format that holds one.
    """
    facts = zip(layout.decoder_layers, layout.experts_per_layer, layout.shared_per_layer, strict=True)
    check_steps(steps, list(facts))
    removed = [
        {s.removal.expert for s in steps if s.removal.layer == layer.ordinal} for layer in layout.layers
    ]
    kept = {
        layer.ordinal: np.setdiff1d(np.arange(layer.num_experts), sorted(removed[layer.ordinal]))
        for layer in layout.layers
    }
    counts = [len(experts) for experts in kept.values()]
    if not layout.family.holds(counts):
        raise UserError(
            "expected a plan that leaves equally many experts in every layer, since the configuration of "
            f"{layout.model_type} holds one number, got {counts}; plan again with a minimum per layer that evens them"
        )
    return kept


def save_merged(
    model: PreTrainedModel, source: Path, out: Path, *, config: Mapping[str, Any], overwrite: bool
) -> None:
    """Write the weights of a model in the dtype of its configuration, with the side files of its source checkpoint.

    Args:
        model: model with equally many experts per layer where its format holds one number.
        source: folder that the model was opened from.
        out: new folder; nothing is left there on a failure.
        config: values of the new ``config.json``, as pruning the same experts writes them.
        overwrite: whether ``out`` may be replaced.
    """
    cast_weights(model, model.config.dtype)
    with new_directory(out, overwrite=overwrite) as directory:
        copy_side_files(source, directory)
        model.save_pretrained(directory)
        write_json(directory / "config.json", config)
