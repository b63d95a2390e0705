"""Ridge regression, against least squares and its closed form."""

import torch

from models.bootstrap.ridge import Moments, low_rank_ridge, solve_ridge


def moments_of(x_TF, y_TY) -> Moments:
    moments = Moments.of_features(x_TF, y_TY.shape[1])
    for features, targets in zip(x_TF.split(64), y_TY.split(64), strict=True):
        moments.add_targets(features, targets)
    return moments


def test_ridge_without_penalty_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=generator), torch.randn(50, 2, generator=generator)
    found = solve_ridge((x.T @ x).double(), (x.T @ y).double(), 0.0)
    torch.testing.assert_close(found, torch.linalg.lstsq(x, y).solution, atol=1e-4, rtol=1e-4)


def test_the_penalty_is_a_share_of_the_mean_squared_feature():
    gram = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    # strength = 0.5 * mean(1, 3) = 1
    found = solve_ridge(gram, torch.ones(2, 1, dtype=torch.float64), 0.5)
    torch.testing.assert_close(found, torch.tensor([[1 / 2], [1 / 4]]))


def test_an_affine_map_of_low_rank_is_recovered():
    generator = torch.Generator().manual_seed(0)
    x_TF = torch.randn(500, 5, generator=generator) + 2
    wanted_TY = x_TF @ torch.randn(5, 2, generator=generator) @ torch.randn(2, 4, generator=generator) + 3
    down, up, bias = low_rank_ridge(moments_of(x_TF, wanted_TY), 2, penalty=0.0)
    assert (down.shape, up.shape, bias.shape) == ((2, 5), (4, 2), (4,))
    torch.testing.assert_close(x_TF @ down.T @ up.T + bias, wanted_TY, atol=1e-3, rtol=1e-3)


def test_of_full_rank_it_is_the_affine_ridge_regression_and_lower_ranks_fit_less():
    generator = torch.Generator().manual_seed(1)
    x_TF, y_TY = (torch.randn(200, 6, generator=generator) for _ in range(2))
    y_TY = y_TY + x_TF.roll(1, 1)
    mean_F, offset_Y = x_TF.mean(0), y_TY.mean(0)
    centered_TF = x_TF - mean_F
    weight = solve_ridge((centered_TF.T @ centered_TF).double(), (centered_TF.T @ (y_TY - offset_Y)).double())
    fits = [low_rank_ridge(moments_of(x_TF, y_TY), rank) for rank in (1, 3, 6)]
    predicted = [x_TF @ down.T @ up.T + bias for down, up, bias in fits]
    torch.testing.assert_close(predicted[-1], centered_TF @ weight + offset_Y, atol=1e-4, rtol=1e-4)
    errors = [float((each - y_TY).square().sum()) for each in predicted]
    assert errors[0] > errors[1] > errors[2]
