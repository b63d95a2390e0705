"""Export of an expert graph as a dense Llama."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedModel

from experts.graph.expert_graph import reachable
from models.export.lost import listed_by_layer
from models.export.plain_model import plain_model
from models.remote_code.configuration_fedgraft import FedGraftConfig
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


@torch.no_grad()
def dense_model(graph: FedGraftForCausalLM) -> PreTrainedModel:
    """Concatenate the experts of each layer to a dense FFN, with neurons in the order of the dense base.

    Without the neurons of retired experts the dense model may be narrower than the base; every layer is padded with
    zero neurons to the widest. Default outputs are left out: with every expert active they add nothing, unless experts
    were removed since they were fitted.
    """
    layers = graph.expert_layers()
    width = max(layer.neurons.numel() for layer in layers)
    dense = plain_model(graph, LlamaForCausalLM, dense_config(graph.config, width))
    for target, source in zip(dense.model.layers, layers, strict=True):
        gate, up, down = dense_weights(source, width)
        target.mlp.gate_proj.weight.copy_(gate)
        target.mlp.up_proj.weight.copy_(up)
        target.mlp.down_proj.weight.copy_(down)
    return dense


def dense_config(config: FedGraftConfig, width: int) -> LlamaConfig:
    """Llama configuration of an FFN ``width`` neurons wide, without the graph's own fields."""
    own = set(FedGraftConfig.__annotations__) | {
        "model_type",
        "architectures",
        "auto_map",
        "transformers_version",
    }
    inherited = {key: value for key, value in config.to_dict().items() if key not in own}
    return LlamaConfig(**{**inherited, "intermediate_size": width})


def dense_weights(layer: ExpertGraphMLP, width: int) -> tuple[Tensor, Tensor, Tensor]:
    """Gate ``[width, D]``, up ``[width, D]`` and down ``[D, width]`` of a layer's concatenated experts."""
    gate_EHD, up_EHD = layer.gate_up_proj.chunk(2, dim=1)
    rows = [gate_EHD.flatten(0, 1), up_EHD.flatten(0, 1), layer.down_proj.transpose(1, 2).flatten(0, 1)]
    origin = layer.neurons.flatten()
    # Neurons of spawned experts have no index in the base (-1) and come last.
    order = torch.where(origin < 0, origin.max() + 1, origin).argsort(stable=True)
    gate, up, down = (torch.nn.functional.pad(part[order], (0, 0, 0, width - len(order))) for part in rows)
    return gate, up, down.T


def not_representable(graph: FedGraftForCausalLM) -> list[str]:
    """Properties of a graph that a dense Llama cannot represent, one line a kind, with their layers."""
    found: dict[str, list[int]] = {}
    for index, layer in enumerate(graph.expert_layers()):
        if bool(((layer.edge_gain != 0) & layer.edges.triu(1)).any()):
            found.setdefault("information passed along edges (edge gains are not zero)", []).append(index)
        if bool((layer.output_gain != 0).any()):
            found.setdefault("outputs weighted by the router (output gains are not zero)", []).append(index)
        if layer.default is not None and layer.default.num_experts > layer.num_experts - len(layer.attached):
            found.setdefault("default outputs in place of removed experts", []).append(index)
        if not reachable(layer.edges.cpu().numpy()).all():
            found.setdefault("experts that no walk reaches, and a dense FFN always runs", []).append(index)
    return listed_by_layer(found)
