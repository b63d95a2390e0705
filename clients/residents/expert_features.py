"""Features of every expert on a client's own text: the input of its assembler."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.graph.runtime_settings import Observer, frozen, gating, observing_walks, visiting
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.remote_code.routing_fedgraft import Walk

NUM_FEATURES = 5
# Index of the log selection frequency.
FREQUENCY = 1
# Blocks per gradient of the Fisher importance.
_SPLIT = 2


def expert_features(
    model: FedGraftForCausalLM, input_ids: Tensor, labels: Tensor, *, visits: Sequence[int]
) -> list[Tensor]:
    """Features of every expert on the client's own text, per layer ``[E, NUM_FEATURES]``.

    Feature 0 ranks the experts for an untrained assembler: the mean of the logarithms of selection frequency and Fisher
    importance. The others: log selection frequency, mean router logit (standardized over the layer), mean softmax
    probability, and depth from 0 to 1.

    Args:
        model: global graph, all experts resident.
        input_ids: training blocks of the client, ``[N, S]``.
        labels: labels, ``[N, S]``.
        visits: experts per token of the client, per layer.
    """
    layers = model.expert_layers()
    sums = [torch.zeros(3, layer.num_experts) for layer in layers]

    def observer(index: int) -> Observer:
        def observe(layer: ExpertGraphMLP, scores_TE: Tensor, walk: Walk, weights_TK: Tensor) -> None:
            picked = walk.experts_TK[walk.experts_TK >= 0]
            seen = (
                torch.bincount(picked, minlength=layer.num_experts),
                scores_TE.sum(0),
                scores_TE.softmax(-1).sum(0),
            )
            sums[index] += torch.stack([each.float().cpu() for each in seen])

        return observe

    with torch.no_grad(), observing_walks(model, observer):
        model(input_ids=input_ids.to(model.device), use_cache=False)
    importance = gate_importance(model, input_ids, labels, visits=visits)
    means = [total / input_ids.numel() for total in sums]
    return [
        _layer_features(layers, index, mean, each)
        for index, (mean, each) in enumerate(zip(means, importance, strict=True))
    ]


def gate_importance(
    model: FedGraftForCausalLM, input_ids: Tensor, labels: Tensor, *, visits: Sequence[int]
) -> list[Tensor]:
    """Fisher importance of each expert, per layer ``[E]``: squared gradient of the loss by a gate on its output.

    As in structured pruning (Theis et al., 2018, arXiv:1801.05787), summed over pairs of blocks.

    Args:
        model: graph with all experts resident; its parameters receive no gradient.
        input_ids: tokens, ``[N, S]``.
        labels: labels, ``[N, S]``.
        visits: experts per token, per layer.
    """
    layers = model.expert_layers()
    total = [torch.zeros(layer.num_experts) for layer in layers]
    with visiting(model, visits), frozen(model), gating(model):
        for ids, targets in zip(input_ids.split(_SPLIT), labels.split(_SPLIT), strict=True):
            gates = [
                torch.ones(layer.num_experts, device=model.device, requires_grad=True) for layer in layers
            ]
            for layer, gate in zip(layers, gates, strict=True):
                layer.residency_gate = gate
            loss = model(
                input_ids=ids.to(model.device), labels=targets.to(model.device), use_cache=False
            ).loss
            for each, gradient in zip(total, torch.autograd.grad(loss, gates), strict=True):
                each += gradient.square().cpu()
    return total


def _layer_features(
    layers: Sequence[ExpertGraphMLP], index: int, means: Tensor, importance_E: Tensor
) -> Tensor:
    layer = layers[index]
    frequency = torch.log(means[0] / max(layer.num_visits, 1) * layer.num_experts + 1e-3)
    relative = importance_E / importance_E.mean().clamp(min=1e-30)
    columns = [
        (frequency + torch.log(relative + 1e-3)) / 2,
        frequency,
        _standardize(means[1]),
        means[2] * layer.num_experts,
        torch.full_like(means[0], index / max(len(layers) - 1, 1)),
    ]
    return torch.stack(columns, -1)


def _standardize(values_E: Tensor) -> Tensor:
    spread = values_E.std(correction=0)
    return (values_E - values_E.mean()) / spread.clamp(min=1e-6)
