"""Taking experts out of an opened model, in place.

Shape suffixes: D hidden width, E experts, H neurons per expert.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.errors import UserError
from experts.graph.edge_edits import Edit
from experts.graph.expert_edits import MERGE, RETIRE, EditedGraph, apply_expert_edits
from experts.graph.expert_graph import ExpertGraph
from models.graph.graph_state import read_graph
from models.moe.views import MoELayer, moe_layers
from models.remote_code.experts_fedgraft import ExpertGraphMLP

# By expert that goes: the one that it was merged into, or None.
Gone = Mapping[int, int | None]

_COUNTS = ("num_experts", "n_routed_experts", "num_local_experts")
_TOP_KS = ("top_k", "num_experts_per_tok")


@torch.no_grad()
def keep_experts(model: PreTrainedModel, keep_map: Mapping[int, np.ndarray]) -> PreTrainedModel:
    """Take all experts but those of ``keep_map`` out of a model, in place; a layer that it does not name keeps all.

    The configuration follows where it can hold the new counts (see ``set_counts``).

    Args:
        model: any with experts (see ``models.moe.views``).
        keep_map: MoE-layer ordinal to the experts that stay.
    """
    for layer in moe_layers(model):
        kept = keep_map.get(layer.ordinal)
        if kept is not None:
            gone = np.setdiff1d(np.arange(layer.num_experts), kept).tolist()
            shrink_layer(model, layer, dict.fromkeys(gone))
    set_counts(model)
    return model


@torch.no_grad()
def shrink_layer(model: PreTrainedModel, layer: MoELayer, gone: Gone) -> None:
    """Take experts out of one layer, in place; ``layer`` is of no use afterwards.

    A graph is edited as ``apply_expert_edits`` says, its version left as it is.

    Raises:
        UserError: no expert would stay.
    """
    if not gone:
        return
    kept = torch.tensor([expert for expert in range(layer.num_experts) if expert not in gone])
    if not len(kept):
        raise UserError(f"expected an expert to stay in MoE layer {layer.ordinal}, got none")
    if isinstance(layer.block, ExpertGraphMLP):
        _shrink_graph(layer.block, _edited(read_graph(model), layer.ordinal, gone), layer.ordinal)
        return
    _shrink_router(layer, kept)
    if isinstance(layer.experts, nn.ModuleList):
        layer.block.experts = nn.ModuleList(layer.experts[expert] for expert in kept.tolist())
    else:
        for name in ("gate_up_proj", "down_proj"):
            setattr(layer.experts, name, nn.Parameter(getattr(layer.experts, name)[kept]))


def set_counts(model: PreTrainedModel) -> None:
    """Let the configuration say how many experts each layer has, and how many a token visits at most.

    Where layers differ in a format that holds one number for all, it is left as it was: such a model runs, and cannot
    be saved.
    """
    layers = moe_layers(model)
    counts = [layer.num_experts for layer in layers]
    if isinstance(layers[0].block, ExpertGraphMLP):
        model.config.num_experts = counts
        model.config.experts_per_token = min(model.config.experts_per_token, max(counts))
    elif len(set(counts)) == 1:
        for key in _COUNTS:
            if hasattr(model.config, key):
                setattr(model.config, key, counts[0])
        model.config.num_experts_per_tok = min(model.config.num_experts_per_tok, counts[0])


def _edited(graph: ExpertGraph, ordinal: int, gone: Gone) -> EditedGraph:
    edits = [
        Edit(RETIRE, ordinal, expert, expert) if into is None else Edit(MERGE, ordinal, into, expert)
        for expert, into in gone.items()
    ]
    return apply_expert_edits(graph, edits)


def _shrink_graph(block: ExpertGraphMLP, edited: EditedGraph, layer: int) -> None:
    kept = torch.from_numpy(edited.kept[layer])
    if block.storage is not None or block.held != list(range(block.num_experts)):
        raise UserError(
            "expected a graph that holds all its experts in memory, got one that has them elsewhere"
        )
    for name in ("gate_up_proj", "down_proj", "router", "output_gain"):
        setattr(block, name, nn.Parameter(getattr(block, name)[kept]))
    learned = ~torch.from_numpy(edited.added[layer])
    for name in ("edge_gain", "edge_affinity"):
        setattr(block, name, nn.Parameter(getattr(block, name)[kept][:, kept] * learned))
    block.edges = torch.from_numpy(edited.graph.masks[layer])
    block.neurons = block.neurons[kept]
    block.held = list(range(len(kept)))
    block.num_visits = min(block.num_visits, len(kept))


def _shrink_router(layer: MoELayer, kept: Tensor) -> None:
    assert layer.router is not None
    layer.router.weight = nn.Parameter(layer.router_weight[kept])
    if layer.selection_bias is not None:
        bias = layer.selection_bias[kept]
        layer.router.e_score_correction_bias = nn.Parameter(bias) if _trains(layer) else bias
    if isinstance(layer.router, nn.Linear):
        layer.router.out_features = len(kept)
    for module in (layer.block, layer.router, layer.experts):
        _set_numbers(module, _COUNTS, lambda _: len(kept))
        _set_numbers(module, _TOP_KS, lambda top_k: min(top_k, len(kept)))


def _trains(layer: MoELayer) -> bool:
    return isinstance(layer.selection_bias, nn.Parameter)


def _set_numbers(module: nn.Module, names: Sequence[str], change: Callable[[int], int]) -> None:
    for name in names:
        if isinstance(getattr(module, name, None), int):
            setattr(module, name, change(getattr(module, name)))
