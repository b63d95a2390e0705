from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from models.calibration import contributions
from models.router_init import centroid_router, expert_contributions, ridge_routers
from tests.conftest import tiny_llama
from tests.tiny_graphs import ffn_inputs, random_ids

MEMBERS = torch.randperm(64, generator=torch.Generator().manual_seed(0)).view(4, 16)


@pytest.fixture(scope="module")
def dense():
    return tiny_llama()


@torch.no_grad()
def test_an_experts_contribution_is_the_sum_over_its_neurons(dense):
    mlp, x = dense.model.layers[1].mlp, torch.randn(5, 32)
    each = contributions(mlp, x)
    expected = torch.stack([sum(each[:, neuron] for neuron in rows) for rows in MEMBERS.tolist()], dim=-1)
    torch.testing.assert_close(expert_contributions(mlp, x, MEMBERS), expected)


def test_the_centroid_is_the_mean_gate_row(dense):
    mlp = dense.model.layers[0].mlp
    router = centroid_router(mlp, MEMBERS)
    for expert, rows in enumerate(MEMBERS.tolist()):
        torch.testing.assert_close(router[expert], sum(mlp.gate_proj.weight[row] for row in rows) / 16)


@pytest.mark.parametrize("penalty", [1e-3, 0.5])
def test_ridge_is_the_least_squares_solution_of_the_augmented_system(dense, penalty):
    ids = random_ids(dense, 20, 16)
    routers = ridge_routers(dense, ids, [MEMBERS, MEMBERS.flip(0)], penalty=penalty)
    for layer, members in enumerate((MEMBERS, MEMBERS.flip(0))):
        x = ffn_inputs(dense, ids, layer).double()
        target = expert_contributions(dense.model.layers[layer].mlp, x.float(), members).double()
        target = (target - target.mean(-1, keepdim=True)).detach().numpy()
        ridge = penalty * float((x.T @ x).diagonal().mean())
        rows = np.vstack([x.numpy(), np.sqrt(ridge) * np.eye(32)])
        weights = np.linalg.lstsq(rows, np.vstack([target, np.zeros((32, 4))]), rcond=None)[0]
        assert routers[layer].shape == (4, 32) and routers[layer].dtype == torch.float32
        np.testing.assert_allclose(routers[layer].numpy(), weights.T, rtol=1e-4, atol=1e-5)


@torch.no_grad()
def test_ridge_ranks_experts_nearer_to_their_contribution_than_the_centroid(dense):
    ids = random_ids(dense, 60, 32)
    ridge = ridge_routers(dense, ids, [MEMBERS, MEMBERS])[0]
    mlp, x = dense.model.layers[0].mlp, ffn_inputs(dense, random_ids(dense, 20, 32, seed=9), 0)
    truth = expert_contributions(mlp, x, MEMBERS).flatten()
    found = [
        spearmanr(truth, (x @ router.T).flatten()).statistic
        for router in (ridge, centroid_router(mlp, MEMBERS))
    ]
    assert found[0] > found[1] and found[0] > 0


def test_inputs_that_are_all_zero_give_a_finite_router(dense):
    silent = tiny_llama()
    torch.nn.init.zeros_(silent.model.layers[0].post_attention_layernorm.weight)
    assert torch.isfinite(ridge_routers(silent, random_ids(silent), [MEMBERS, MEMBERS])[0]).all()
