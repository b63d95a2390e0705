"""Auxiliary losses on the router logits of a forward pass: load balance and z-loss.

Shape suffixes: T tokens, E experts of the layer, K visits per token.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import NamedTuple

import torch
from torch import Tensor

from models.graph.runtime_settings import Observer, observing_walks
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.remote_code.routing_fedgraft import Walk


class Routing(NamedTuple):
    """Router logits and visits of one layer in one forward pass.

    Attributes:
        scores_TE: router logits, with their gradient.
        experts_TK: visited experts; -1 for visits not made.
        resident_E: bool, the experts that may be visited; None for all.
        num_shared: shared experts, the first of the layer, which every token visits.
    """

    scores_TE: Tensor
    experts_TK: Tensor
    resident_E: Tensor | None
    num_shared: int = 0


@contextmanager
def collect_routing(model: FedGraftForCausalLM) -> Iterator[list[Routing]]:
    """Context that collects the routing of every layer in every forward pass.

    Losses are computed afterwards, so that the recomputation of a checkpointed layer does not repeat them.
    """
    collected: list[Routing] = []

    def observer(index: int) -> Observer:
        def observe(layer: ExpertGraphMLP, scores_TE: Tensor, walk: Walk, weights_TK: Tensor) -> None:
            # Visits of attached experts, the last columns, are not the router's choice.
            chosen_TK = walk.experts_TK[:, : walk.experts_TK.shape[1] - len(layer.attached)]
            collected.append(Routing(scores_TE, chosen_TK, layer.chosen_residents(), layer.num_shared))

        return observe

    with observing_walks(model, observer):
        yield collected


def router_loss(
    routings: Sequence[Routing], *, load_balance_weight: float = 0.0, z_loss_weight: float = 0.0
) -> Tensor:
    """Weighted sum of load-balance loss and z-loss, each averaged over layers, a scalar."""
    total = torch.zeros((), device=routings[0].scores_TE.device)
    for routing in routings:
        if load_balance_weight:
            total = total + load_balance_weight * load_balance_loss(routing)
        if z_loss_weight:
            total = total + z_loss_weight * z_loss(routing)
    return total / len(routings)


def load_balance_loss(routing: Routing) -> Tensor:
    """Load-balance loss ``E * sum_e f_e P_e`` over the routed residents: 1 for uniform routing, E for one expert only.

    Switch Transformer, Fedus et al. (2021, arXiv:2101.03961), equation 4. ``f_e`` is expert e's share of all visits, so
    that the loss does not grow with the visits per token, and ``P_e`` its softmax share among the residents, averaged
    over tokens. Only P has a gradient. Shared experts, whose load cannot change, are left out of both; zero where no
    token visits another.
    """
    shared = routing.num_shared
    scores_TE = _resident_scores(routing)[:, shared:]
    made = routing.experts_TK[routing.experts_TK >= shared] - shared
    if not len(made):
        return scores_TE.new_zeros(())
    visits_E = torch.bincount(made, minlength=scores_TE.shape[-1]).to(scores_TE.dtype)
    share_E = scores_TE.softmax(-1).mean(0)
    residents = (scores_TE[0] > float("-inf")).sum()
    return residents * (visits_E / len(made) * share_E).sum()


def z_loss(routing: Routing) -> Tensor:
    """Mean over tokens of the squared log-sum-exp of the residents' logits, which penalizes large logits.

    ST-MoE, Zoph et al. (2022, arXiv:2202.08906), equation 5.
    """
    return _resident_scores(routing).logsumexp(-1).square().mean()


def _resident_scores(routing: Routing) -> Tensor:
    if routing.resident_E is None:
        return routing.scores_TE
    return routing.scores_TE.masked_fill(~routing.resident_E, float("-inf"))
