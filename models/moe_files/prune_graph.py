"""Edges of a stored expert graph after pruning, with their gains and affinities."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from experts.graph.expert_edits import EditedGraph, apply_expert_edits, retirements
from experts.graph.expert_graph import ExpertGraph
from models.files.safetensors_files import read_stored
from models.moe_files.layout import MoELayout

MASK = "edges"
# Configuration key of the attached experts of each layer.
ATTACHED = "attached_experts"


def read_stored_graph(layout: MoELayout) -> ExpertGraph:
    """Read the masks of a stored expert graph.

    Raises:
        UserError: a mask that is not upper-triangular.
    """
    names = [name for layer in layout.layers for name in layer.pairs if name.endswith(MASK)]
    masks = tuple(read_stored(layout.tensors[name]).numpy() for name in names)
    version = layout.config.get(layout.family.version_key, 0)
    attached = tuple(tuple(each) for each in layout.config.get(ATTACHED) or ())
    return ExpertGraph(masks, version, tuple(layout.shared_per_layer), attached)


def pruned_pairs(
    layout: MoELayout, keep_map: Mapping[int, np.ndarray]
) -> tuple[dict[str, Tensor], ExpertGraph | None]:
    """Tensors ``[E', E']`` of the kept experts by name, and their graph.

    Returns:
        see ``edited_pairs``; no tensor and no graph for a family without edges.

    Raises:
        UserError: as ``retire_stored_experts``.
    """
    if not layout.family.pairs:
        return {}, None
    edited = retire_stored_experts(layout, keep_map)
    return edited_pairs(layout, edited), edited.graph


def retire_stored_experts(layout: MoELayout, keep_map: Mapping[int, np.ndarray]) -> EditedGraph:
    """Edit a stored expert graph: retire all experts but those of ``keep_map`` (see ``apply_expert_edits``).

    Raises:
        UserError: as ``read_stored_graph``; an expert or layer that is not there.
    """
    return apply_expert_edits(read_stored_graph(layout), retirements(keep_map, layout.experts_per_layer))


def edited_pairs(layout: MoELayout, edited: EditedGraph) -> dict[str, Tensor]:
    """Tensors ``[E', E']`` of an edited graph by name, in their stored dtypes.

    Old edges keep gain and affinity. New edges start at zero, since nothing was learned for them: they change no output
    until trained, but may open a closed root earlier.
    """
    pairs = {}
    for layer, mask, kept, added in zip(
        layout.layers, edited.graph.masks, edited.kept, edited.added, strict=True
    ):
        for name in layer.pairs:
            if name.endswith(MASK):
                pairs[name] = torch.from_numpy(mask.copy())
            else:
                values = read_stored(layout.tensors[name])[kept][:, kept]
                pairs[name] = values.masked_fill(torch.from_numpy(added), 0)
    return pairs
