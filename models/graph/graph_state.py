"""Reading, checking and writing the masks of an opened expert graph."""

from __future__ import annotations

import torch

from experts.graph.expert_graph import ExpertGraph, check_reachable
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


def read_graph(model: FedGraftForCausalLM) -> ExpertGraph:
    """The graph that a model holds, as plain data."""
    masks = tuple(layer.edges.cpu().numpy().copy() for layer in model.expert_layers())
    return ExpertGraph(masks, model.config.graph_version)


def check_graph(model: FedGraftForCausalLM) -> None:
    """Refuse a graph whose masks are not upper-triangular or leave an expert out of reach.

    Raises:
        UserError: names the layer.
    """
    for layer, mask in enumerate(read_graph(model).masks):
        check_reachable(mask, layer)


def write_graph(model: FedGraftForCausalLM, graph: ExpertGraph) -> None:
    """Give a model the masks and the version of ``graph``; gains of edges that are gone return to zero.

    An edge that comes back later starts again from zero.
    """
    with torch.no_grad():
        for layer, mask in zip(model.expert_layers(), graph.masks, strict=True):
            layer.edges.copy_(torch.from_numpy(mask))
            for values in (layer.edge_gain, layer.edge_affinity):
                values.mul_(layer.edges.triu(1))
    model.config.graph_version = graph.version
