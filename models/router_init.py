"""Routers in closed form, without any training."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.calibration import contributions, visit_ffn_inputs

ROUTERS = ("ridge", "centroid")


def expert_contributions(mlp: nn.Module, x_TD: Tensor, members_EH: Tensor) -> Tensor:
    """Contribution of each expert, ``[T, E]``: the sum over its neurons of ``|h_i| * norm(w_down_i)``."""
    return contributions(mlp, x_TD)[:, members_EH].sum(-1)


def centroid_router(mlp: nn.Module, members_EH: Tensor) -> Tensor:
    """Mean gate row of each expert, ``[E, D]`` (EMoE's avg-k gating, arXiv:2310.10908)."""
    return mlp.gate_proj.weight.float()[members_EH].mean(1)


def ridge_routers(
    model: PreTrainedModel, input_ids: Tensor, members: Sequence[Tensor], *, penalty: float = 1e-3
) -> list[Tensor]:
    """Regress each expert's contribution on the FFN input, in closed form.

    Args:
        model: a dense Llama.
        input_ids: calibration text, ``[N, S]``.
        members: per layer ``[E, H]``, the neurons of each expert.
        penalty: ridge penalty as a share of the mean squared input.

    Returns:
        Per layer ``[E, D]``, fp32: ``argmin_W sum_t |W x_t - c_t|^2 + penalty * tr(X'X)/D * |W|^2``, where the
        contributions ``c`` are taken relative to their mean over experts, which no ranking depends on.
    """
    layers = [layer.mlp for layer in model.model.layers]
    width = model.config.hidden_size
    gram = [torch.zeros(width, width, dtype=torch.float64) for _ in layers]
    moment = [torch.zeros(width, len(rows), dtype=torch.float64) for rows in members]

    def visit(layer: int, x_TD: Tensor) -> None:
        target = expert_contributions(layers[layer], x_TD, members[layer])
        target = (target - target.mean(-1, keepdim=True)).double().cpu()
        x = x_TD.double().cpu()
        gram[layer] += x.T @ x
        moment[layer] += x.T @ target

    visit_ffn_inputs(model, input_ids, visit)
    return [_solve(g, m, penalty) for g, m in zip(gram, moment, strict=True)]


def _solve(gram: Tensor, moment: Tensor, penalty: float) -> Tensor:
    ridge = penalty * gram.diagonal().mean().clamp(min=1e-12)
    return (
        torch.linalg.solve(gram + ridge * torch.eye(len(gram), dtype=gram.dtype), moment)
        .T.float()
        .contiguous()
    )
