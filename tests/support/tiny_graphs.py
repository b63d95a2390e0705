"""Small expert graphs, made in memory, and ways to compare models."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from models.bootstrap.build import BootstrapOptions, build_graph, plan_experts
from models.bootstrap.calibration import visit_ffn_inputs
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from tests.conftest import tiny_llama


def random_ids(model: PreTrainedModel, blocks: int = 4, length: int = 48, *, seed: int = 0) -> Tensor:
    """Random tokens ``[blocks, length]`` of the model's vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(model.config.vocab_size, (blocks, length), generator=generator)


@torch.no_grad()
def ffn_inputs(dense: PreTrainedModel, ids: Tensor, layer: int) -> Tensor:
    """What the FFN of ``layer`` receives for ``ids``, ``[T, D]``."""
    parts: list[Tensor] = []
    visit_ffn_inputs(dense, ids, lambda at, x_TD: parts.append(x_TD) if at == layer else None)
    return torch.cat(parts)


def graph_of(
    dense: PreTrainedModel | None = None, *, num_experts: int = 4, visits: int = 4, **plan
) -> FedGraftForCausalLM:
    """An expert graph of ``dense`` (default: the tiny Llama), calibrated on random tokens."""
    dense = tiny_llama() if dense is None else dense
    experts = plan_experts(dense, random_ids(dense), BootstrapOptions(num_experts=num_experts, **plan))
    return build_graph(dense, experts, visits)


def shared_graph_of(
    dense: PreTrainedModel | None = None, *, num_experts: int = 8, **plan
) -> FedGraftForCausalLM:
    """An expert graph with two shared experts a layer and default outputs of rank 3; half of the experts a token."""
    planned = {"router": "contribution", "num_shared": 2, "default_rank": 3, "edges_per_expert": 2} | plan
    return graph_of(dense, num_experts=num_experts, visits=num_experts // 2, **planned)


@torch.no_grad()
def logit_difference(one: PreTrainedModel, other: PreTrainedModel, ids: Tensor) -> float:
    """Largest absolute difference of two models' logits."""
    return float((one(input_ids=ids).logits - other(input_ids=ids).logits).abs().max())


def with_random_gains(graph: FedGraftForCausalLM, *, seed: int = 0) -> FedGraftForCausalLM:
    """Give every gain, affinity and output gain a random value and open every edge of routed experts, in place."""
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for layer in graph.expert_layers():
            for gain in (layer.edge_gain, layer.edge_affinity, layer.output_gain):
                gain.copy_(torch.randn(gain.shape, generator=generator) / 2)
            layer.edges.copy_(torch.ones_like(layer.edges).triu())
            layer.edges[: layer.num_shared] = torch.eye(layer.num_experts, dtype=torch.bool)[
                : layer.num_shared
            ]
    return graph
