"""Ridge regression by Gram matrices, in double precision."""

from __future__ import annotations

import torch
from torch import Tensor

# Penalty as a share of the mean squared feature.
PENALTY = 1e-2


def ridge(features_TF: Tensor, targets_TY: Tensor, penalty: float = PENALTY) -> Tensor:
    """Weights ``[F, Y]``, fp32, of a ridge regression without intercept; ``penalty`` as in ``solve_ridge``."""
    gram_FF, moment_FY = features_TF.T @ features_TF, features_TF.T @ targets_TY
    return solve_ridge(gram_FF.double(), moment_FY.double(), penalty)


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
