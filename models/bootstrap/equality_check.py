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
def check_equality(
    dense: PreTrainedModel, graph: FedGraftForCausalLM, input_ids: Tensor, *, exact: bool = True
) -> float:
    """Relative difference of the logits of a graph with all experts active: norm of the difference over norm of dense.

    Args:
        dense: dense base, in the dtype of the graph.
        graph: its expert graph.
        input_ids: ``[N, S]``; the first tokens of the first block are compared.
        exact: whether the graph was built to equal the dense model.

    Raises:
        UserError: the graph was built to equal the dense model and does not.
    """
    ids = input_ids[:1, :_TOKENS].to(dense.device)
    expected = dense(input_ids=ids).logits.float()
    with visiting(graph, [layer.num_experts for layer in graph.expert_layers()]):
        found = graph(input_ids=ids).logits.float()
    difference = float((found - expected).norm() / expected.norm().clamp(min=1e-30))
    tolerance = _TOLERANCE.get(dense.dtype, _TOLERANCE_16_BIT)
    if exact and not difference <= tolerance:
        raise UserError(
            f"expected logits within {tolerance:g} of those of the dense model with all experts active, got a relative "
            f"difference of {difference:.2g}; the weights hold something that an expert graph of this type leaves out"
        )
    return difference
