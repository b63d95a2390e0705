"""Ridge regression by Gram matrices, in double precision, and its solution of low rank.

Shape suffixes: T tokens, F features, Y targets, R rank.
"""

from __future__ import annotations

from dataclasses import dataclass

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


@dataclass
class Moments:
    """Sums over tokens that determine a regression with an intercept, fp64.

    Attributes:
        tokens: number of tokens.
        gram_FF: Gram matrix of the features.
        sum_F: sum of the features.
        moment_FY: products of features and targets.
        sum_Y: sum of the targets.
    """

    tokens: int
    gram_FF: Tensor
    sum_F: Tensor
    moment_FY: Tensor
    sum_Y: Tensor

    @classmethod
    def of_features(cls, features_TF: Tensor, targets: int) -> Moments:
        """Moments of the features, and zeros for ``targets`` targets that ``add_targets`` is given."""
        features_TF = features_TF.float()
        gram_FF, sum_F = (features_TF.T @ features_TF).double(), features_TF.sum(0, dtype=torch.float64)
        moment_FY = gram_FF.new_zeros(len(sum_F), targets)
        return cls(len(features_TF), gram_FF, sum_F, moment_FY, gram_FF.new_zeros(targets))

    def add_targets(self, features_tF: Tensor, targets_tY: Tensor) -> None:
        """Add the targets of some of the tokens, next to the features of these tokens."""
        self.moment_FY += (features_tF.float().T @ targets_tY.float()).double()
        self.sum_Y += targets_tY.sum(0, dtype=torch.float64)


def low_rank_ridge(moments: Moments, rank: int, penalty: float = PENALTY) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced-rank ridge regression with an intercept (Izenman, 1975).

    The ridge solution is projected onto the leading principal directions of its predictions.

    Args:
        moments: moments of features and targets.
        rank: R; at most Y is used.
        penalty: as in ``solve_ridge``, for features relative to their mean.

    Returns:
        ``down [R, F]``, ``up [Y, R]`` and ``bias [Y]``, fp32; the prediction is ``x @ down.T @ up.T + bias``.
    """
    mean_F, offset_Y = moments.sum_F / moments.tokens, moments.sum_Y / moments.tokens
    centered_FF = moments.gram_FF - moments.sum_F.outer(mean_F)
    weight_FY = solve_ridge(centered_FF, moments.moment_FY - moments.sum_F.outer(offset_Y), penalty).double()
    up_YR = torch.linalg.eigh(weight_FY.T @ centered_FF @ weight_FY)[1][:, -rank:]
    down_RF = (weight_FY @ up_YR).T
    bias_Y = offset_Y - up_YR @ (down_RF @ mean_F)
    return down_RF.float().contiguous(), up_YR.float().contiguous(), bias_Y.float()
