from __future__ import annotations

import numpy as np
import pytest
import torch
from scipy.stats import spearmanr

from models.bootstrap import router_init
from models.bootstrap.calibration import contributions, hidden_activations
from models.bootstrap.fisher import output_metrics
from models.bootstrap.router_init import (
    centroid_router,
    elimination_places,
    expert_contributions,
    ridge_routers,
    visited_experts,
)
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import ffn_inputs, random_ids

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


def eliminate(outputs):
    """Places of one token's experts by the definition: drop what, with all dropped so far, is missed least."""
    left, places = list(range(len(outputs))), [0] * len(outputs)
    while left:
        dropped = [e for e in range(len(outputs)) if e not in left]
        least = min(left, key=lambda e: float(sum(outputs[other] for other in [*dropped, e]).norm()))
        places[least] = len(left)
        left.remove(least)
    return places


@torch.no_grad()
@pytest.mark.parametrize("values_at_once", [1, 2**24])
def test_experts_are_eliminated_as_a_plain_loop_does(dense, monkeypatch, values_at_once):
    monkeypatch.setattr(router_init, "_OUTPUT_VALUES", values_at_once)
    mlp, x, root = dense.model.layers[1].mlp, torch.randn(20, 32), torch.randn(32, 32)
    places = elimination_places(mlp, x, MEMBERS, root)
    hidden = hidden_activations(mlp, x)
    outputs = torch.stack([hidden[:, rows] @ mlp.down_proj.weight[:, rows].T @ root for rows in MEMBERS], 1)
    assert places.tolist() == [eliminate(token) for token in outputs]


@torch.no_grad()
def test_experts_that_cancel_each_other_go_together():
    mlp, x = tiny_llama().model.layers[0].mlp, torch.randn(50, 32)
    for weight in (mlp.gate_proj.weight, mlp.up_proj.weight):
        weight[MEMBERS[1]] = weight[MEMBERS[0]]
    mlp.down_proj.weight[:, MEMBERS[0]] *= 3
    mlp.down_proj.weight[:, MEMBERS[1]] = -mlp.down_proj.weight[:, MEMBERS[0]]
    places = elimination_places(mlp, x, MEMBERS, torch.eye(32))
    assert ((places[:, 0] - places[:, 1]).abs() == 1).all()


@pytest.mark.parametrize("penalty", [1e-2, 0.5])
def test_ridge_is_the_least_squares_solution_of_the_augmented_system(dense, penalty):
    ids = random_ids(dense, 20, 16)
    metrics = output_metrics(dense, ids)
    routers = ridge_routers(dense, ids, [MEMBERS, MEMBERS.flip(0)], penalty=penalty)
    for layer, members in enumerate((MEMBERS, MEMBERS.flip(0))):
        x = ffn_inputs(dense, ids, layer)
        root = torch.linalg.cholesky(metrics[layer])
        with torch.no_grad():
            target = -elimination_places(dense.model.layers[layer].mlp, x, members, root).double().sqrt()
        target = (target - target.mean(-1, keepdim=True)).numpy()
        ridge = penalty * float((x.T @ x).diagonal().mean())
        rows = np.vstack([x.double().numpy(), np.sqrt(ridge) * np.eye(32)])
        weights = np.linalg.lstsq(rows, np.vstack([target, np.zeros((32, 4))]), rcond=None)[0]
        assert routers[layer].shape == (4, 32) and routers[layer].dtype == torch.float32
        np.testing.assert_allclose(routers[layer].numpy(), weights.T, rtol=1e-3, atol=1e-4)


@torch.no_grad()
def test_ridge_keeps_more_of_the_output_than_the_centroid(dense):
    ids = random_ids(dense, 60, 32)
    ridge = ridge_routers(dense, ids, [MEMBERS, MEMBERS])[0]
    mlp, x = dense.model.layers[0].mlp, ffn_inputs(dense, random_ids(dense, 20, 32, seed=9), 0)
    places = elimination_places(mlp, x, MEMBERS, torch.eye(32)).flatten()
    found = [
        spearmanr(-places, (x @ router.T).flatten()).statistic
        for router in (ridge, centroid_router(mlp, MEMBERS))
    ]
    assert found[0] > found[1] and found[0] > 0


def test_a_model_in_bf16_gives_nearly_the_same_router(dense):
    ids = random_ids(dense, 60, 32)
    metrics = output_metrics(dense, ids)
    half = tiny_llama().to(torch.bfloat16)
    pairs = [ridge_routers(model, ids, [MEMBERS] * 2, metrics=metrics)[0] for model in (dense, half)]
    assert torch.nn.functional.cosine_similarity(*[pair.flatten() for pair in pairs], dim=0) > 0.97


def test_inputs_that_are_all_zero_give_a_finite_router(dense):
    silent = tiny_llama()
    torch.nn.init.zeros_(silent.model.layers[0].post_attention_layernorm.weight)
    assert torch.isfinite(ridge_routers(silent, random_ids(silent), [MEMBERS, MEMBERS])[0]).all()


def test_shared_experts_are_visited_by_every_token():
    visited = visited_experts(torch.eye(3), torch.tensor([[-9.0] * 3, [1, 2, 3], [3, 1, 1]]), 2, 1)
    assert visited.tolist() == [[True, False, True], [True, True, False], [True, True, False]]
