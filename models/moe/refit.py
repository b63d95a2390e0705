"""Fitting merged experts to what their layer gave before, by least squares on calibration text.

MergeMoE (arXiv:2510.14436) merges experts so that their outputs come close, not their weights. Here the down projection
of each merged expert is fitted to what is missing in the output of the whole layer.
Shape suffixes: T tokens, N tokens of one expert, D hidden width, H neurons per expert.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

from models.moe.hooks import observing_experts
from models.moe.layers import ExpertRows, MoELayer
from models.remote_code.execution_fedgraft import gated

# Of the mean square of an expert's neurons: what holds its down projection where the text says little.
RIDGE = 0.01
# Tokens visit several experts, and each fit changes what the others should do.
SWEEPS = 4


@torch.no_grad()
def block_output(layer: MoELayer, x_TD: Tensor) -> Tensor:
    """What the layer's block gives for tokens ``x``, ``[T, D]``, fp32."""
    output = layer.block(x_TD[None])
    return (output[0] if isinstance(output, tuple) else output)[0].float()


@torch.no_grad()
def refit_experts(layer: MoELayer, experts: Sequence[int], x_TD: Tensor, wanted_TD: Tensor) -> None:
    """Change the down projections of ``experts`` so that the layer gives ``wanted`` for ``x`` as closely as they can.

    One expert after another, in several sweeps, each by ridge regression on what the others leave, towards the
    projection that it has by then.

    Args:
        layer: after its experts were merged.
        experts: their numbers.
        x_TD: what the layer receives.
        wanted_TD: what its block gave for that before.
    """
    visited: dict[int, ExpertRows] = {}

    def keep(_: MoELayer, rows: ExpertRows) -> None:
        # What all the others receive and give would be many times what the layer does.
        if rows.expert in experts:
            visited[rows.expert] = rows

    for _ in range(SWEEPS):
        with observing_experts([layer], keep):
            missing_TD = wanted_TD.float() - block_output(layer, x_TD)
        for rows in (visited[expert] for expert in experts if expert in visited):
            missing_TD[rows.tokens] -= _refit(layer, rows, missing_TD[rows.tokens])


def _refit(layer: MoELayer, rows: ExpertRows, missing_ND: Tensor) -> Tensor:
    """Refit one expert and return what it adds by that, ``[N, D]``."""
    gate_up, down = layer.read(rows.expert)
    hidden_NH = gated(layer.act_fn, rows.inputs.float() @ gate_up.float().T) * rows.gates.float()[:, None]
    gram_HH = hidden_NH.T @ hidden_NH
    gram_HH.diagonal().add_(RIDGE * gram_HH.diagonal().mean().clamp(min=1e-12))
    change_HD = torch.linalg.solve(gram_HH, hidden_NH.T @ missing_ND)
    layer.write(rows.expert, gate_up, down.float() + change_HD.T)
    return hidden_NH @ change_HD
