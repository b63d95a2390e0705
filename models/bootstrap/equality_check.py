"""Comparison of an expert graph, all experts active, with its dense base by their logits."""

from __future__ import annotations

import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.errors import UserError
from models.graph.runtime_settings import visiting
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

# Largest relative difference between logits of the same function, by dtype: sums are taken in another order.
_TOLERANCE = {torch.float32: 1e-3, torch.float64: 1e-3}
_TOLERANCE_16_BIT = 5e-2
_TOKENS = 64


@torch.no_grad()
def first_logits(model: PreTrainedModel, input_ids: Tensor) -> Tensor:
    """Logits ``[1, T, V]`` of the first tokens of the first block of ``input_ids [N, S]``."""
    return model(input_ids=input_ids[:1, :_TOKENS].to(model.device)).logits


def check_equality(
    expected: Tensor, graph: FedGraftForCausalLM, input_ids: Tensor, *, exact: bool = True
) -> float:
    """Relative difference of the logits of a graph with all experts active: norm of the difference over norm of dense.

    Args:
        expected: ``first_logits`` of the dense base, in the dtype of the graph.
        graph: its expert graph.
        input_ids: ``[N, S]``.
        exact: whether the graph was built to equal the dense model.

    Raises:
        UserError: the graph was built to equal the dense model and does not.
    """
    with visiting(graph, [layer.num_experts for layer in graph.expert_layers()]):
        found = first_logits(graph, input_ids).float()
    difference = float((found - expected.float()).norm() / expected.float().norm().clamp(min=1e-30))
    tolerance = _TOLERANCE.get(expected.dtype, _TOLERANCE_16_BIT)
    if exact and not difference <= tolerance:
        raise UserError(
            f"expected logits within {tolerance:g} of those of the dense model with all experts active, got a relative "
            f"difference of {difference:.2g}; the weights hold something that an expert graph of this type leaves out"
        )
    return difference
