"""From router scores to the experts that tokens visit and their gates, for each kind of router.

Shape suffixes: T tokens, D hidden width, E experts, K visits per token.
"""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor

from configs.errors import UserError
from models.moe.views import MoELayer, RouterKind

_SIGMOID = (RouterKind.SIGMOID_BIASED,)


def router_logits(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """Scores ``[T, E]`` of the router before softmax or sigmoid, in fp32."""
    return F.linear(x_TD.float(), layer.router_weight.float())


def all_gates(layer: MoELayer, logits_TE: Tensor) -> Tensor:
    """The gate ``[T, E]`` that each expert would have if every expert were visited."""
    return logits_TE.sigmoid() if layer.kind in _SIGMOID else logits_TE.softmax(-1)


def route(layer: MoELayer, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Experts ``[T, K]`` that tokens visit, best first, and their gates ``[T, K]``.

    Raises:
        UserError: a graph, whose walk also follows edges, or a router that chooses among groups of experts.
    """
    if layer.kind is RouterKind.GRAPH_WALK:
        raise UserError("expected a router that scores alone decide, got a graph; walk it instead")
    if layer.kind is RouterKind.SIGMOID_BIASED:
        return _route_sigmoid(layer, logits_TE)
    if layer.kind is RouterKind.TOP_K_SOFTMAX:
        best_TK, experts_TK = logits_TE.topk(layer.top_k, -1)
        return experts_TK, best_TK.softmax(-1)
    gates_TK, experts_TK = logits_TE.softmax(-1).topk(layer.top_k, -1)
    if layer.kind is RouterKind.SOFTMAX_TOP_K_RENORMALIZED:
        gates_TK = gates_TK / gates_TK.sum(-1, keepdim=True)
    return experts_TK, gates_TK


def _route_sigmoid(layer: MoELayer, logits_TE: Tensor) -> tuple[Tensor, Tensor]:
    """DeepSeek-V3 (arXiv:2412.19437), section 2.1.2: a bias takes part in the choice, not in the gates."""
    for name in ("n_group", "num_group"):
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
