"""Top-k experts and gates from router logits, for each kind of router.

Shape suffixes: T tokens, D hidden width, E experts, K visits per token.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch
import torch.nn.functional as F
from torch import Tensor

from configs.errors import UserError
from models.families.family import RouterKind
from models.moe.layers import MoELayer
from models.remote_code.dispatch_fedgraft import dispatch


def router_logits(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """Router logits ``[T, E]``, before softmax or sigmoid, fp32."""
    return F.linear(x_TD.float(), layer.router_weight.float())


def all_gates(layer: MoELayer, logits_TE: Tensor) -> Tensor:
    """Gates ``[T, E]`` if every token visited every expert.

    Outputs of an expert graph add up with weights of about one, whichever others are visited.
    """
    if layer.kind is RouterKind.GRAPH_WALK:
        return torch.ones_like(logits_TE)
    return logits_TE.sigmoid() if layer.kind is RouterKind.SIGMOID_BIASED else logits_TE.softmax(-1)


def route(layer: MoELayer, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Top-k experts ``[T, K]`` by descending logit, and their gates ``[T, K]``.

    Raises:
        UserError: graph routing, which also follows edges, or group-limited routing.
    """
    if layer.kind is RouterKind.GRAPH_WALK:
        raise UserError(
            "expected plain top-k routing, got a model that uses graph routing: walk its edges, too"
        )
    if layer.kind is RouterKind.SIGMOID_BIASED:
        return _route_sigmoid(layer, logits_TE)
    if layer.kind is RouterKind.TOP_K_SOFTMAX:
        best_TK, experts_TK = logits_TE.topk(layer.top_k, -1)
        return experts_TK, best_TK.softmax(-1)
    gates_TK, experts_TK = logits_TE.softmax(-1).topk(layer.top_k, -1)
    if layer.kind is RouterKind.SOFTMAX_TOP_K_RENORMALIZED:
        gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
    return experts_TK, gates_TK


def tokens_by_expert(experts_TK: Tensor, num_experts: int) -> Iterator[tuple[int, Tensor, Tensor]]:
    """Number of each visited expert, with the ``[N]`` places of its visits in the flattened ``[T, K]`` and tokens."""
    for expert, (places_N, tokens_N) in enumerate(zip(*dispatch(experts_TK, num_experts), strict=True)):
        if len(tokens_N):
            yield expert, places_N, tokens_N


def _route_sigmoid(layer: MoELayer, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3 (arXiv:2412.19437), section 2.1.2: a bias takes part in the choice, not in the gates."""
    groups = layer.family.groups
    for name in groups.count_names if groups else ():
        if getattr(layer.router, name, 1) not in (None, 1):
            raise UserError(
                f"expected a router that chooses among all experts, got {name} = {getattr(layer.router, name)}"
            )
    scores_TE = logits_TE.sigmoid()
    bias = layer.selection_bias
    chosen_by_TE = scores_TE if bias is None else scores_TE + bias
    experts_TK = chosen_by_TE.topk(layer.top_k, -1).indices
    gates_TK = scores_TE.gather(-1, experts_TK)
    if getattr(layer.router, "norm_topk_prob", True):
        gates_TK = gates_TK / (gates_TK.sum(-1, keepdim=True) + 1e-20)
    return experts_TK, gates_TK * getattr(layer.router, "routed_scaling_factor", 1.0)
