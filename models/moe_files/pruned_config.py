"""Configuration of a pruned mixture of experts."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np

from configs.errors import UserError
from experts.graph.expert_graph import ExpertGraph
from models.files.tied_head import has_own_head
from models.moe_files.layout import MoELayout
from models.moe_files.prune_graph import ATTACHED


def pruned_config(
    layout: MoELayout, kept: Mapping[int, np.ndarray], graph: ExpertGraph | None = None
) -> tuple[dict[str, Any], tuple[str, ...]]:
    """Build ``config.json`` of a pruned checkpoint, with a warning for each change other than the number of experts.

    Args:
        layout: checkpoint before pruning.
        kept: per MoE layer, the old numbers of the kept experts.
        graph: pruned expert graph; None for other formats.

    Raises:
        UserError: router groups that the kept experts do not fill evenly, or with fewer than two each.
    """
    family, config = layout.family, dict(layout.config)
    counts = [len(kept[layer]) for layer in range(len(layout.layers))]
    keys = [key for key in family.count_keys if config.get(key) is not None] or [family.count_keys[0]]
    config |= dict.fromkeys(keys, family.count_value(counts))
    if family.default_key and layout.config.get("default_rank"):
        config[family.default_key] = layout.config.get(family.default_key) or layout.experts_per_layer
    warnings = []
    most, groups_warning = _selectable(config, layout, kept, max(counts))
    top_k = config.get(family.top_k_key)
    if isinstance(top_k, int) and top_k > most:
        config[family.top_k_key] = most
        warnings.append(f"{family.top_k_key} goes from {top_k} to {most}, as many experts as can be chosen")
    if layout.beyond:
        config["num_nextn_predict_layers"] = 0
        warnings.append(f"{len(layout.beyond)} tensors of layers that predict further tokens are left out")
    if config.get("tie_word_embeddings") and has_own_head(layout.tensors):
        config["tie_word_embeddings"] = False
    if graph is not None:
        config[family.version_key] = graph.version
        if config.get(ATTACHED):
            config[ATTACHED] = [list(each) for each in graph.attached] or None
    return config, (*warnings, *groups_warning)


def _selectable(
    config: Mapping[str, Any], layout: MoELayout, kept: Mapping[int, np.ndarray], count: int
) -> tuple[int, tuple[str, ...]]:
    """Number of experts that one token can choose from, and a warning where router groups change their members."""
    if layout.family.groups is None:
        return count, ()
    groups = config.get(layout.family.groups.count_key) or 1
    if count % groups or count // groups < 2:
        raise UserError(
            f"expected at least two experts in each of the router's {groups} groups, equally many in each, "
            f"got {count} experts; keep another multiple of {groups}"
        )
    before = [layout.layers[layer].num_experts // groups for layer in kept]
    uneven = [
        layer
        for layer, size in zip(kept, before, strict=True)
        if (np.bincount(kept[layer] // size, minlength=groups) != count // groups).any()
    ]
    named = ", ".join(map(str, uneven))
    warning = f"the router's groups in layers {named} have other members, since they keep different numbers"
    return count // groups * (config.get(layout.family.groups.selected_key) or groups), (
        (warning,) if uneven else ()
    )
