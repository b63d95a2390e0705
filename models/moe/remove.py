"""Removal of experts from an opened model, in place."""

from __future__ import annotations

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager

import numpy as np
import torch
from transformers import PreTrainedModel

from configs.errors import UserError
from models.moe.layers import MoELayer, Removed
from models.moe.views import moe_layers, replace_block


@torch.no_grad()
def keep_experts(model: PreTrainedModel, keep_map: Mapping[int, np.ndarray]) -> PreTrainedModel:
    """Remove all experts but those of ``keep_map`` from a model, in place; an unnamed layer keeps all.

    The configuration follows where it can hold the new counts (see ``set_counts``).

    Args:
        model: any with experts (see ``models.moe.views``).
        keep_map: MoE-layer ordinal to the kept experts.
    """
    _remove_others(model, keep_map)
    set_counts(model)
    return model


@contextmanager
def experts_removed(model: PreTrainedModel, keep_map: Mapping[int, np.ndarray]) -> Iterator[PreTrainedModel]:
    """Context in which a model holds the experts of ``keep_map`` alone; then it is as before, bit for bit.

    Only the weights of the kept experts and their routers are copied. The configuration stays as it is.

    Args:
        model: any with experts (see ``models.moe.views``).
        keep_map: MoE-layer ordinal to the kept experts; an unnamed layer keeps all.
    """
    blocks = [layer.block for layer in moe_layers(model)]
    try:
        for layer in moe_layers(model):
            if layer.ordinal in keep_map:
                # A memo that holds the tensors already lets the copy share them.
                shared = {
                    id(tensor): tensor for tensor in (*layer.block.parameters(), *layer.block.buffers())
                }
                replace_block(model, layer, copy.deepcopy(layer.block, shared))
        _remove_others(model, keep_map)
        yield model
    finally:
        for layer, block in zip(moe_layers(model), blocks, strict=True):
            replace_block(model, layer, block)


@torch.no_grad()
def remove_experts(layer: MoELayer, removed: Removed) -> None:
    """Remove experts from one layer, in place; the view ``layer`` is stale afterwards.

    An expert graph is rewired as ``apply_expert_edits`` does; its version stays.

    Raises:
        UserError: no expert would stay, or one of them is shared.
    """
    if not removed:
        return
    if len(removed) >= layer.num_experts:
        raise UserError(f"expected an expert to stay in MoE layer {layer.ordinal}, got none")
    layer.remove(removed)


def _remove_others(model: PreTrainedModel, keep_map: Mapping[int, np.ndarray]) -> None:
    for layer in moe_layers(model):
        kept = keep_map.get(layer.ordinal)
        if kept is not None:
            removed = np.setdiff1d(np.arange(layer.num_experts), kept).tolist()
            remove_experts(layer, dict.fromkeys(removed))


def set_counts(model: PreTrainedModel) -> None:
    """Set the configuration's number of experts, and cap its experts per token at it.

    A configuration with one number for all layers is left as it was where they differ: such a model runs, and cannot
    be saved.
    """
    layers = moe_layers(model)
    family, counts = layers[0].family, [layer.num_experts for layer in layers]
    if family.default_key and getattr(model.config, "default_rank", 0):
        fitted = getattr(model.config, family.default_key) or model.config.num_experts
        setattr(model.config, family.default_key, fitted)
    if getattr(model.config, "attached_experts", None):
        model.config.attached_experts = [list(layer.experts.attached) for layer in layers]
    if not family.holds(counts):
        return
    for key in family.count_keys:
        if hasattr(model.config, key):
            setattr(model.config, key, family.count_value(counts))
    top_k = min(getattr(model.config, family.top_k_key), max(counts))
    setattr(model.config, family.top_k_key, top_k)
