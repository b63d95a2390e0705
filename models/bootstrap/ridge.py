"""Ridge regression by Gram matrices, in double precision, and its solution of low rank.

Shape suffixes: T tokens, F features, Y targets, R rank.
"""

from __future__ import annotations

import torch
from torch import Tensor

# Penalty as a share of the mean squared feature.
PENALTY = 1e-2


def solve_ridge(gram_FF: Tensor, moment_FY: Tensor, penalty: float = PENALTY) -> Tensor:
    """Weights ``[F, Y]``, fp32, of a ridge regression from the Gram matrix of its features.

    Args:
        gram_FF: Gram matrix of the features, fp64.
        moment_FY: products of features and targets, fp64.
        penalty: penalty as a share of the mean squared feature.
    """
    strength = penalty * gram_FF.diagonal().mean().clamp(min=1e-12)
    penalized_FF = gram_FF + strength * torch.eye(len(gram_FF), dtype=gram_FF.dtype, device=gram_FF.device)
    return torch.linalg.solve(penalized_FF, moment_FY).float()


def low_rank_ridge(
    features_TF: Tensor, targets_TY: Tensor, rank: int, *, gram_FF: Tensor, penalty: float = PENALTY
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced-rank ridge regression with an intercept (Izenman, 1975).

    The ridge solution is projected onto the leading principal directions of its predictions.

    Args:
        features_TF: features, fp32.
        targets_TY: targets, fp32.
        rank: R; at most Y is used.
        gram_FF: Gram matrix of ``features_TF``.
        penalty: as in ``solve_ridge``, for features relative to their mean.

    Returns:
        ``down [R, F]``, ``up [Y, R]`` and ``bias [Y]``, fp32; the prediction is ``x @ down.T @ up.T + bias``.
    """
    mean_F, offset_Y = (values.mean(0, dtype=torch.float64) for values in (features_TF, targets_TY))
    tokens = len(features_TF)
    centered_FF = gram_FF.double() - tokens * mean_F.outer(mean_F)
    moment_FY = (features_TF.T @ targets_TY).double() - tokens * mean_F.outer(offset_Y)
    weight_FY = solve_ridge(centered_FF, moment_FY, penalty).double()
    up_YR = torch.linalg.eigh(weight_FY.T @ centered_FF @ weight_FY)[1][:, -rank:]
    down_RF = (weight_FY @ up_YR).T
    bias_Y = offset_Y - up_YR @ (down_RF @ mean_F)
    return down_RF.float().contiguous(), up_YR.float().contiguous(), bias_Y.float()
