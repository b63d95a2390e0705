"""The assembler: which experts a client holds, learned from its own data within its budget."""

from __future__ import annotations

import math
from collections.abc import Iterator, Sequence

import torch
from torch import Tensor, nn

from models.experts_fedgraft import ExpertGraphMLP
from models.modeling_fedgraft import FedGraftForCausalLM
from models.routing_fedgraft import Walk
from models.settings import Observer, observing

NUM_FEATURES = 5


class Assembler(nn.Module):
    """Scores every pair of experts of a layer from features of the single experts.

    One MLP serves all layers; the depth of a layer is a feature. Its last layer starts at zero, so that an untrained
    assembler ranks experts by how often the client's own tokens select them.

    Args:
        hidden_size: width of the MLP.
        embedding_size: width of the source and target embeddings.
    """

    def __init__(self, *, hidden_size: int = 32, embedding_size: int = 8):
        super().__init__()
        self.encoder = nn.Sequential(nn.Linear(NUM_FEATURES, hidden_size), nn.SiLU())
        self.embed = nn.Linear(hidden_size, 2 * embedding_size)
        self.root = nn.Linear(hidden_size, 1)
        nn.init.zeros_(self.root.weight)
        nn.init.zeros_(self.root.bias)
        nn.init.normal_(self.embed.weight, std=1e-2)
        nn.init.zeros_(self.embed.bias)

    def forward(self, features_EF: Tensor) -> Tensor:
        """Logits ``Z [E, E]`` of a layer: ``Z[e, e]`` for holding e, ``Z[p, q]`` for the pair along an edge p -> q."""
        hidden = self.encoder(features_EF)
        source, target = self.embed(hidden).chunk(2, -1)
        pair_EE = source @ target.T / math.sqrt(source.shape[-1])
        # Feature 0 is the log of the selection frequency: the prior that learning moves away from.
        alone_E = self.root(hidden).squeeze(-1) + features_EF[:, 0]
        return pair_EE.triu(1) + torch.diag_embed(alone_E)


def holding_scores(logits_EE: Tensor, edges_EE: Tensor) -> Tensor:
    """How much a client wants each expert, ``[E]``: its own logit plus the mean logit of its edges in the graph."""
    edges_EE = edges_EE.triu(1)
    touching = logits_EE * edges_EE
    degree = (edges_EE.sum(0) + edges_EE.sum(1)).clamp(min=1)
    return logits_EE.diagonal() + (touching.sum(0) + touching.sum(1)) / degree


def choose_residents(scores_E: Tensor, budget: int) -> Tensor:
    """The ``budget`` best-scored experts, bool ``[E]``; all of them for a budget of 0 or above E.

    On ties the lower, more general expert is held.
    """
    if budget <= 0 or budget >= len(scores_E):
        return torch.ones_like(scores_E, dtype=torch.bool)
    best = scores_E.argsort(descending=True, stable=True)[:budget]
    return torch.zeros_like(scores_E, dtype=torch.bool).scatter(0, best, True)


def straight_through(scores_E: Tensor, resident_E: Tensor) -> Tensor:
    """The residency as 0 and 1, with the gradient of a sigmoid around the score at which the budget cuts.

    Straight-through estimator of Bengio et al. (2013, arXiv:1308.3432).
    """
    if bool(resident_E.all()):
        return torch.ones_like(scores_E)
    inside, outside = scores_E[resident_E].min(), scores_E[~resident_E].max()
    soft = torch.sigmoid(scores_E - ((inside + outside) / 2).detach())
    # In this order the sum is exactly 0 or 1.
    return resident_E.to(soft) + (soft - soft.detach())


@torch.no_grad()
def expert_features(model: FedGraftForCausalLM, input_ids: Tensor) -> list[Tensor]:
    """Features of every expert as the client's own tokens see it, per layer ``[E, NUM_FEATURES]``.

    Log selection frequency, mean router score (standardised over the layer), mean softmax share, mean norm of the
    down projection (standardised), and depth between 0 and 1.

    Args:
        model: the global graph, all experts resident.
        input_ids: some of the client's training blocks, ``[N, S]``.
    """
    layers = model.expert_layers()
    sums = [torch.zeros(3, layer.num_experts) for layer in layers]

    def observer(index: int) -> Observer:
        def observe(layer: ExpertGraphMLP, scores_TE: Tensor, walk: Walk, weights_TK: Tensor) -> None:
            picked = walk.experts_TK[walk.experts_TK >= 0]
            sums[index][0] += torch.bincount(picked, minlength=layer.num_experts)
            sums[index][1] += scores_TE.sum(0)
            sums[index][2] += scores_TE.softmax(-1).sum(0)

        return observe

    with observing(model, observer):
        model(input_ids=input_ids, use_cache=False)
    return [_layer_features(layers, index, total / input_ids.numel()) for index, total in enumerate(sums)]


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
    """Learn residency through the task loss, the experts themselves left alone.

    Each token also computes its best expert outside the budget, with an output weight of zero, so that experts on
    both sides of the cut learn whether they should change places.

    Args:
        assembler: trained in place.
        model: the global graph; on return its residency is that of the trained assembler.
        features: as ``expert_features`` gives them.
        batches: endless ``(input_ids, labels)`` of the client's training blocks.
        budget: experts per layer the client can hold; 0 for all.
        steps: optimizer steps; 0 leaves the assembler as it is.
        learning_rate: of AdamW.
        autocast: run matrix products in bf16.

    Returns:
        The loss of each step, nats per token.
    """
    optimizer = torch.optim.AdamW(assembler.parameters(), lr=learning_rate)
    losses = []
    trainable = [parameter for parameter in model.parameters() if parameter.requires_grad]
    _require_grad(trainable, False)
    for _ in range(steps):
        _set_residency(model, assembler, features, budget, learn=True)
        input_ids, labels = next(batches)
        with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
            loss = model(input_ids=input_ids, labels=labels, use_cache=False).loss
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        losses.append(float(loss.detach()))
    _require_grad(trainable, True)
    with torch.no_grad():
        _set_residency(model, assembler, features, budget, learn=False)
    return losses


def _set_residency(
    model: FedGraftForCausalLM, assembler: Assembler, features: Sequence[Tensor], budget: int, *, learn: bool
) -> None:
    for layer, rows in zip(model.expert_layers(), features, strict=True):
        scores = holding_scores(assembler(rows), layer.edges)
        layer.resident = choose_residents(scores.detach(), budget)
        layer.residency_gate = straight_through(scores, layer.resident) if learn else None


def _layer_features(layers: Sequence[ExpertGraphMLP], index: int, means: Tensor) -> Tensor:
    layer = layers[index]
    frequency = means[0] / max(layer.num_visits, 1) * layer.num_experts
    columns = [
        torch.log(frequency + 1e-3),
        _standardise(means[1]),
        means[2] * layer.num_experts,
        _standardise(torch.stack([layer.read_expert(e)[1].float().norm() for e in range(layer.num_experts)])),
        torch.full_like(means[0], index / max(len(layers) - 1, 1)),
    ]
    return torch.stack(columns, -1)


def _standardise(values_E: Tensor) -> Tensor:
    spread = values_E.std(correction=0)
    return (values_E - values_E.mean()) / spread.clamp(min=1e-6)


def _require_grad(parameters: Sequence[nn.Parameter], value: bool) -> None:
    for parameter in parameters:
        parameter.requires_grad_(value)
