"""Directions of FFN inputs whose product is about 1 for every token: the constant that routers and FFNs lack.

Shape suffixes: T tokens, D hidden width.
"""

from __future__ import annotations

import torch
from torch import Tensor

from models.bootstrap.calibration import visit_ffn_inputs
from models.bootstrap.ridge import solve_ridge
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

# Penalty as a share of the mean squared feature.
_PENALTY = 1e-4


def constant_features(graph: FedGraftForCausalLM, input_ids: Tensor) -> list[Tensor]:
    """Per layer ``[D]``, fp32: ridge regression of the number 1 from the FFN's input.

    Args:
        graph: expert graph.
        input_ids: text ``[N, S]``.
    """
    width = graph.config.hidden_size
    grams = [torch.zeros(width, width, dtype=torch.float64) for _ in graph.expert_layers()]
    sums = [torch.zeros(width, dtype=torch.float64) for _ in grams]

    def visit(layer: int, x_TD: Tensor) -> None:
        x_TD = x_TD.float().cpu()
        grams[layer] += (x_TD.T @ x_TD).double()
        sums[layer] += x_TD.sum(0, dtype=torch.float64)

    visit_ffn_inputs(graph, input_ids, visit)
    return [
        solve_ridge(gram, total[:, None], _PENALTY)[:, 0] for gram, total in zip(grams, sums, strict=True)
    ]
