"""Properties of an expert graph that a plain mixture of experts cannot hold, with their layers."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from experts.graph.expert_graph import reachable
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


def lost_in_mixture(graph: FedGraftForCausalLM) -> list[str]:
    """Properties of a graph that top-k routing to plain experts lacks, one line a kind, with their layers.

    Empty if the mixture that ``models.export.flat_layer`` makes equals the graph, up to rounding.
    """
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(graph.expert_layers()):
        for what in _lost_in_layer(layer):
            found.setdefault(what, []).append(index)
    return listed_by_layer(found)


def listed_by_layer(found: dict[str, list[int]]) -> list[str]:
    """One line for each property: its name and its layers."""
    return [f"{what}: layers {', '.join(map(str, where))}" for what, where in found.items()]


def _lost_in_layer(layer: ExpertGraphMLP) -> Iterator[str]:
    edges = layer.edges.triu(1)
    chosen = [expert for expert in range(layer.num_experts) if expert not in layer.attached]
    visits = min(layer.num_visits, len(chosen))
    if bool(((layer.edge_gain != 0) & edges).any()):
        yield "information passed along edges (edge gains are not zero)"
    if bool((layer.output_gain != 0).any()):
        yield "outputs weighted by the router (output gains are not zero)"
    if layer.attached:
        yield "attached experts, visited wherever their parents are"
    if layer.default is not None and layer.default.num_experts > visits:
        yield "default outputs of experts that a token does not visit"
    if visits == len(chosen):
        if not reachable(layer.edges.cpu().numpy())[chosen].all():
            yield "experts that no walk reaches"
        return
    if bool(((layer.edge_affinity != 0) & edges).any()):
        yield "choices that depend on visited parents (edge affinities are not zero)"
    if not bool(layer.edges.diagonal()[torch.tensor(chosen)].all()):
        yield "experts that are reached along edges only (closed roots)"
    if layer.order == "depth-first" and bool(edges.any()):
        yield "the depth-first order of visits"
