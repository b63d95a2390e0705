"""Gradient of router logits through the choice of experts, by a straight-through estimator.

Shape suffixes: T tokens, D hidden width, E experts, K visits per token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from models.graph.runtime_settings import observing_walks
from models.remote_code.dense_path_fedgraft import by_expert
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


@contextmanager
def straight_through(graph: FedGraftForCausalLM) -> Iterator[None]:
    """Context in which router logits receive a gradient for every expert, visited or not; outputs are unchanged.

    In the backward pass the weight of a routed expert is the sigmoid of its router logit above the midpoint between
    the logits of the token's lowest visited and highest unvisited expert, over the standard deviation of the token's
    logits (straight-through estimator, Bengio et al., 2013, arXiv:1308.3432). All experts run on all tokens. Layers in
    which edges pass information, or whose experts are not all in the fused tensors, keep their usual gradient.
    """
    layers = [layer for layer in graph.expert_layers() if _supports(layer)]
    logits: dict[int, Tensor] = {}
    keep = observing_walks(
        graph, lambda index: lambda layer, logits_TE, *_: logits.update({id(layer): logits_TE})
    )
    try:
        for layer in layers:
            layer.__dict__["run_experts"] = _gated_run(layer, logits)
        with keep:
            yield
    finally:
        for layer in layers:
            layer.__dict__.pop("run_experts", None)


def soft_gates(logits_TE: Tensor, visited_TE: Tensor, num_shared: int) -> Tensor:
    """Differentiable stand-in ``[T, E]`` for the mask of the visited experts; constant for shared experts.

    Args:
        logits_TE: router logits.
        visited_TE: bool, the visited experts.
        num_shared: shared experts, the first of the layer.
    """
    routed_TE = logits_TE[:, num_shared:]
    chosen_TE, fixed_TE = visited_TE[:, num_shared:], routed_TE.detach()
    lowest = fixed_TE.masked_fill(~chosen_TE, float("inf")).amin(-1, keepdim=True)
    highest = fixed_TE.masked_fill(chosen_TE, float("-inf")).amax(-1, keepdim=True)
    # Where all or none of the routed experts are visited, one bound is infinite and the other is used.
    lowest, highest = lowest.where(lowest.isfinite(), highest), highest.where(highest.isfinite(), lowest)
    scale = fixed_TE.std(-1, keepdim=True, correction=0).clamp(min=1e-6)
    soft_TE = torch.sigmoid((routed_TE - (lowest + highest) / 2) / scale)
    return torch.cat([visited_TE[:, :num_shared].to(soft_TE), soft_TE], -1)


def _supports(layer: ExpertGraphMLP) -> bool:
    whole = layer.storage is None and len(layer.held) == layer.num_experts and layer.resident is None
    return whole and layer.num_shared < layer.num_experts


def _gated_run(layer: ExpertGraphMLP, logits: dict[int, Tensor]) -> Callable[..., Tensor]:
    """``layer.run_experts`` with a straight-through gradient of the logits that the layer's observer has stored."""
    usual, experts = layer.run_experts, layer.num_experts

    def run(
        x_TD: Tensor, weights_TK: Tensor, experts_TK: Tensor, gain_EE: Tensor, edges_EE: Tensor
    ) -> Tensor:
        if edges_EE.any() or not torch.is_grad_enabled():
            return usual(x_TD, weights_TK, experts_TK, gain_EE, edges_EE)
        hard_TE = by_expert(experts_TK, weights_TK, experts)
        visited_TE = by_expert(experts_TK, torch.ones_like(weights_TK), experts) > 0
        soft_TE = soft_gates(logits[id(layer)], visited_TE, layer.num_shared).to(hard_TE.dtype)
        all_TE = torch.arange(experts, device=x_TD.device).expand(len(x_TD), -1)
        return usual(x_TD, hard_TE + soft_TE - soft_TE.detach(), all_TE, gain_EE, edges_EE)

    return run
