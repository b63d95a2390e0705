"""Assembler: learned choice of a client's resident experts, from its own data within its budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from clients.residents.expert_features import FREQUENCY, NUM_FEATURES
from models.graph.runtime_settings import frozen, gating
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

# Learning rate of the MLP, which is shared by all experts, relative to that of an expert's own logit.
_MLP_RATE = 1 / 30


class Assembler(nn.Module):
    """Logits of every pair of experts of a layer from features of the single experts.

    One MLP serves all layers; the depth of a layer is a feature. In addition each expert has a logit of its own for
    what features do not express. All start at or near zero, so that an untrained assembler ranks experts by feature 0.

    Args:
        num_experts: experts of each layer.
        hidden_size: width of the MLP.
        embedding_size: width of the source and target embeddings.
    """

    def __init__(self, num_experts: Sequence[int], *, hidden_size: int = 32, embedding_size: int = 8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(NUM_FEATURES, hidden_size), nn.SiLU())
        self.embed = nn.Linear(hidden_size, 2 * embedding_size)
        self.root = nn.Linear(hidden_size, 1)
        self.own = nn.ParameterList(torch.zeros(count) for count in num_experts)
        nn.init.zeros_(self.root.weight)
        nn.init.zeros_(self.root.bias)
        nn.init.normal_(self.embed.weight, std=1e-2)
        nn.init.zeros_(self.embed.bias)

    def forward(self, features_EF: Tensor, layer: int) -> Tensor:
        """Logits ``Z [E, E]`` of a layer: ``Z[e, e]`` of residency of e, ``Z[p, q]`` of the pair of an edge p -> q."""
        hidden = self.encoder(features_EF)
        source, target = self.embed(hidden).chunk(2, -1)
        pair_EE = source @ target.T / math.sqrt(source.shape[-1])
        alone_E = self.root(hidden).squeeze(-1) + features_EF[:, 0] + self.own[layer]
        return pair_EE.triu(1) + torch.diag_embed(alone_E)


def holding_scores(logits_EE: Tensor, edges_EE: Tensor) -> Tensor:
    """Residency score of each expert, ``[E]``: its own logit plus the mean logit of its edges in the graph."""
    edges_EE = edges_EE.triu(1)
    touching = logits_EE * edges_EE
    degree = (edges_EE.sum(0) + edges_EE.sum(1)).clamp(min=1)
    return logits_EE.diagonal() + (touching.sum(0) + touching.sum(1)) / degree


def beside_parents(scores_E: Tensor, edges_EE: Tensor, attached: Sequence[int]) -> Tensor:
    """Scores ``[E]`` in which each attached expert has that of its best parent, whose tokens alone visit it.

    A new expert has no statistics of its own. Among equal scores its parent, of a lower number, is selected first.
    """
    if not attached:
        return scores_E
    offered_EA = scores_E[:, None].masked_fill(~edges_EE[:, attached], float("-inf"))
    return scores_E.index_copy(0, torch.tensor(attached, device=scores_E.device), offered_EA.max(0).values)


def choose_residents(scores_E: Tensor, budget: int, num_shared: int = 0) -> Tensor:
    """Top-``budget`` experts by score, bool ``[E]``; all for a budget of 0 or above E.

    The first ``num_shared`` experts, which every token visits, come before all others. Among equal scores the lower,
    more general expert is selected.
    """
    if budget <= 0 or budget >= len(scores_E):
        return torch.ones_like(scores_E, dtype=torch.bool)
    ranked_E = scores_E.detach().clone()
    ranked_E[:num_shared] = torch.inf
    best = ranked_E.argsort(descending=True, stable=True)[:budget]
    return torch.zeros_like(scores_E, dtype=torch.bool).scatter(0, best, True)


def most_used(
    features: Sequence[Tensor], budget: int, num_shared: Sequence[int] | None = None
) -> list[Tensor]:
    """Top-``budget`` experts of each layer by selection frequency on the client's tokens, bool ``[E]``.

    Args:
        features: result of ``expert_features``.
        budget: experts per layer; 0: all.
        num_shared: shared experts per layer, which are always resident; None for none.
    """
    counts = num_shared or [0] * len(features)
    return [
        choose_residents(rows[:, FREQUENCY], budget, shared)
        for rows, shared in zip(features, counts, strict=True)
    ]


def straight_through(scores_E: Tensor, resident_E: Tensor, num_shared: int = 0) -> Tensor:
    """Residency as 0 and 1, with the gradient of a sigmoid around the score threshold of the budget.

    Straight-through estimator of Bengio et al. (2013, arXiv:1308.3432). The first ``num_shared`` experts, which are
    resident whatever their score, do not set the threshold and have no gradient.
    """
    if bool(resident_E.all()) or not bool(resident_E[num_shared:].any()):
        return resident_E.to(scores_E)
    if num_shared:
        routed = straight_through(scores_E[num_shared:], resident_E[num_shared:])
        return torch.cat([resident_E[:num_shared].to(routed), routed])
    inside, outside = scores_E[resident_E].min(), scores_E[~resident_E].max()
    soft = torch.sigmoid(scores_E - ((inside + outside) / 2).detach())
    # This order of operations makes the sum exactly 0 or 1.
    return resident_E.to(soft) + (soft - soft.detach())


def train_assembler(
    assembler: Assembler,
    model: FedGraftForCausalLM,
    features: Sequence[Tensor],
    batches: Iterator[tuple[Tensor, Tensor]],
    *,
    budget: int,
    steps: int,
    learning_rate: float,
    autocast: bool,
) -> list[float]:
    """Train residency through the task loss, with all experts frozen.

    Each token also computes its best expert outside the budget with an output weight of zero, so that experts on both
    sides of the budget threshold receive gradients.

    Args:
        assembler: trained in place.
        model: global graph; its residency is set to that of the trained assembler.
        features: result of ``expert_features``.
        batches: endless ``(input_ids, labels)`` of the client's training blocks.
        budget: experts per layer that the client can hold; 0: all.
        steps: optimizer steps; 0: the assembler is not trained. Neither is it where the budget leaves nothing to
            choose: the shared experts, or all, of every layer.
        learning_rate: Adam's rate for each expert's own logit; a thirtieth of it for the MLP.
        autocast: run matrix products in bf16.

    Returns:
        Loss of each step, nats per token.
    """
    optimizer = _optimizer(assembler, learning_rate)
    losses = []
    device = model.device.type
    with frozen(model), gating(model):
        for _ in range(steps if _chooses(model, budget) else 0):
            _set_residency(model, assembler, features, budget, learn=True)
            input_ids, labels = (each.to(model.device) for each in next(batches))
            with torch.autocast(device, dtype=torch.bfloat16, enabled=autocast):
                loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            losses.append(float(loss.detach()))
    with torch.no_grad():
        _set_residency(model, assembler, features, budget, learn=False)
    return losses


def _chooses(model: FedGraftForCausalLM, budget: int) -> bool:
    """Whether the budget holds some, but not all, of the routed experts of a layer."""
    return any(layer.num_shared < budget < layer.num_experts for layer in model.expert_layers())


def _optimizer(assembler: Assembler, learning_rate: float) -> torch.optim.Optimizer:
    own = list(assembler.own.parameters())
    mlp = [parameter for name, parameter in assembler.named_parameters() if not name.startswith("own.")]
    groups = [{"params": own, "lr": learning_rate}, {"params": mlp, "lr": learning_rate * _MLP_RATE}]
    # Few steps: with the usual betas the moments would remain near their initial zero.
    return torch.optim.Adam([group for group in groups if group["params"]], betas=(0.5, 0.9))


def _set_residency(
    model: FedGraftForCausalLM, assembler: Assembler, features: Sequence[Tensor], budget: int, *, learn: bool
) -> None:
    for index, (layer, rows) in enumerate(zip(model.expert_layers(), features, strict=True)):
        edges = layer.edges.to(rows.device)
        scores = beside_parents(holding_scores(assembler(rows, index), edges), edges, layer.attached)
        resident = choose_residents(scores.detach(), budget, layer.num_shared)
        gate = straight_through(scores, resident, layer.num_shared) if learn else None
        layer.resident = resident.to(layer.edges.device)
        layer.residency_gate = None if gate is None else gate.to(layer.edges.device)
