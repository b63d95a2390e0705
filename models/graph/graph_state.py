"""Masks of an opened expert graph: read, check, write."""

from __future__ import annotations

import torch

from experts.graph.expert_graph import ExpertGraph, check_reachable
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


def read_graph(model: FedGraftForCausalLM) -> ExpertGraph:
    """Copy of the expert graph of a model."""
    layers = model.expert_layers()
    attached = tuple(tuple(layer.attached) for layer in layers)
    return ExpertGraph(
        masks=tuple(layer.edges.cpu().numpy().copy() for layer in layers),
        version=model.config.graph_version,
        num_shared=tuple(layer.num_shared for layer in layers),
        attached=attached if any(attached) else (),
        ids=tuple(layer.ids for layer in layers),
    )


def check_graph(model: FedGraftForCausalLM) -> None:
    """Check that all masks are upper-triangular and every expert is reachable.

    Raises:
        UserError: names the layer.
    """
    for layer, mask in enumerate(read_graph(model).masks):
        check_reachable(mask, layer)


def write_graph(model: FedGraftForCausalLM, graph: ExpertGraph) -> None:
    """Set all but the shared experts from ``graph``; gains and affinities of removed edges become zero.

    An edge that is added again later therefore starts from zero.
    """
    facts = zip(
        model.expert_layers(), graph.masks, graph.attached_per_layer, graph.ids_per_layer, strict=True
    )
    with torch.no_grad():
        for layer, mask, attached, ids in facts:
            layer.edges.copy_(torch.from_numpy(mask))
            layer.attached, layer.ids = list(attached), ids
            for values in (layer.edge_gain, layer.edge_affinity):
                values.mul_(layer.edges.triu(1))
    model.config.graph_version = graph.version
    model.config.attached_experts = [list(each) for each in graph.attached] or None
