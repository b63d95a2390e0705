"""Ridge regression, against least squares and its closed form."""

import torch

from models.bootstrap.ridge import ridge, solve_ridge


def test_ridge_without_penalty_is_least_squares():
    generator = torch.Generator().manual_seed(0)
    x, y = torch.randn(50, 4, generator=generator), torch.randn(50, 2, generator=generator)
    torch.testing.assert_close(ridge(x, y, 0.0), torch.linalg.lstsq(x, y).solution, atol=1e-4, rtol=1e-4)


def test_the_penalty_is_a_share_of_the_mean_squared_feature():
    gram = torch.diag(torch.tensor([1.0, 3.0], dtype=torch.float64))
    # strength = 0.5 * mean(1, 3) = 1
    found = solve_ridge(gram, torch.ones(2, 1, dtype=torch.float64), 0.5)
    torch.testing.assert_close(found, torch.tensor([[1 / 2], [1 / 4]]))
