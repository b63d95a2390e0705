"""Refit of merged experts' down projections to their layer's previous output, by ridge regression on calibration text.

MergeMoE (arXiv:2510.14436) matches outputs of merged experts, not weights. Here the target of each down projection is
the residual of the whole layer's output.
Shape suffixes: T tokens, N tokens of one expert, D hidden width, H neurons per expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.moe.hooks import observing_experts
from models.moe.layers import ExpertRows, MoELayer
from models.remote_code.execution_fedgraft import gated

# Ridge penalty, relative to the mean Gram diagonal.
RIDGE = 0.01
# Sweeps over the experts: tokens visit several, so that each fit changes the residual of the others.
SWEEPS = 4


@torch.no_grad()
def block_output(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """Output of the layer's block for inputs ``x``, ``[T, D]``, fp32."""
    output = layer.block(x_TD[None])
    return (output[0] if isinstance(output, tuple) else output)[0].float()


@torch.no_grad()
def refit_experts(layer: MoELayer, experts: Sequence[int], x_TD: Tensor, wanted_TD: Tensor) -> None:
    """Fit the down projections of ``experts`` to the layer output ``wanted`` for inputs ``x``, in place.

    Block coordinate descent: in each sweep, each expert by ridge regression on the residual of the others, shrunk
    towards its current projection.

    Args:
        layer: layer after merging.
        experts: numbers of the experts to fit.
        x_TD: inputs of the layer.
        wanted_TD: target output of its block.
    """
    visited: dict[int, ExpertRows] = {}

    def keep(_: MoELayer, rows: ExpertRows) -> None:
        # Rows of all experts would take many times the memory of the layer's inputs.
        if rows.expert in experts:
            visited[rows.expert] = rows

    for _ in range(SWEEPS):
        with observing_experts([layer], keep):
            missing_TD = wanted_TD.float() - block_output(layer, x_TD)
        for rows in (visited[expert] for expert in experts if expert in visited):
            missing_TD[rows.tokens] -= _refit(layer, rows, missing_TD[rows.tokens])


def _refit(layer: MoELayer, rows: ExpertRows, missing_ND: Tensor) -> Tensor:
    """Refit one expert; return the change of its gated output, ``[N, D]``."""
    gate_up, down = layer.read(rows.expert)
    hidden_NH = gated(layer.act_fn, rows.inputs.float() @ gate_up.float().T) * rows.gates.float()[:, None]
    gram_HH = hidden_NH.T @ hidden_NH
    gram_HH.diagonal().add_(RIDGE * gram_HH.diagonal().mean().clamp(min=1e-12))
    change_HD = torch.linalg.solve(gram_HH, hidden_NH.T @ missing_ND)
    layer.write(rows.expert, gate_up, down.float() + change_HD.T)
    return hidden_NH @ change_HD
