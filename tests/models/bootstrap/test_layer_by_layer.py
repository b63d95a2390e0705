"""Plans fitted layer by layer: shared experts, routers by contribution, default outputs."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
import torch

from clients.residents.assembler import choose_residents
from configs.errors import UserError
from models.bootstrap import layer_by_layer
from models.bootstrap.build import build_graph, plan_experts
from models.bootstrap.calibration import hidden_activations, visit_ffn_inputs
from models.bootstrap.layer_by_layer import contribution_router
from models.bootstrap.plan import BootstrapOptions
from models.bootstrap.recipe import read_recipe, recipe_of, write_recipe
from models.checkpoints.load import load_causal_lm
from models.checkpoints.save import save_checkpoint
from models.graph.runtime_settings import scaled_visits, visiting
from tests.support.tiny_graphs import logit_difference, random_ids, tiny_llama

OPTIONS = BootstrapOptions(
    8, features="gate-activation", router="contribution", num_shared=2, default_rank=3, edges_per_expert=2
)


@pytest.fixture(scope="module")
def dense():
    return tiny_llama()


@pytest.fixture(scope="module")
def graph(dense):
    return build_graph(dense, plan_experts(dense, random_ids(dense), OPTIONS), OPTIONS.visits)


def test_all_experts_active_equal_the_dense_model(dense, graph):
    with visiting(graph, [8, 8]):
        assert logit_difference(graph, dense, random_ids(dense)) < 1e-4


def test_the_first_experts_hold_the_most_contributing_neurons(dense, graph):
    seen = {}
    visit_ffn_inputs(dense, random_ids(dense), lambda layer, x: seen.update({layer: x}))
    mlp, layer = dense.model.layers[0].mlp, graph.expert_layers()[0]
    size_M = (hidden_activations(mlp, seen[0]) * mlp.down_proj.weight.norm(dim=0)).square().mean(0)
    shared = layer.neurons[:2].flatten()
    assert set(shared.tolist()) == set(size_M.topk(len(shared)).indices.tolist())
    assert sorted(layer.neurons.flatten().tolist()) == list(range(size_M.numel()))
    assert not layer.edges.triu(1)[:2].any()


def test_a_linear_contribution_is_ranked_by_the_router():
    x_TD = torch.randn(400, 6, generator=torch.Generator().manual_seed(0)).abs()
    sizes_TE = x_TD.square().view(-1, 3, 2).sum(-1).sqrt()
    router = contribution_router(x_TD, sizes_TE, (x_TD.T @ x_TD).double())
    assert ((x_TD @ router.T).argmax(-1) == sizes_TE.argmax(-1)).float().mean() > 0.8


def test_a_plan_of_shared_experts_alone_selects_a_fixed_set_of_neurons(dense):
    options = replace(OPTIONS, num_shared=OPTIONS.visits)
    graph = build_graph(dense, plan_experts(dense, random_ids(dense), options), options.visits)
    layer, mlp = graph.expert_layers()[0], dense.model.layers[0].mlp
    x_TD = torch.randn(5, dense.config.hidden_size, generator=torch.Generator().manual_seed(0))
    kept_M = torch.zeros(layer.neurons.numel()).index_fill(0, layer.neurons[: options.visits].flatten(), 1.0)
    fixed_TD = mlp.down_proj(hidden_activations(mlp, x_TD) * kept_M)
    default = layer.default
    wanted_TD = fixed_TD + 0.5 * (x_TD @ default.down.T @ default.up.T + default.bias)
    torch.testing.assert_close(layer(x_TD[None])[0], wanted_TD, atol=1e-5, rtol=1e-4)


def test_plans_do_not_depend_on_how_many_tokens_are_computed_at_once(dense, monkeypatch):
    whole = plan_experts(dense, random_ids(dense), OPTIONS)
    monkeypatch.setattr(layer_by_layer, "_ROWS", 7)
    for one, other in zip(whole, plan_experts(dense, random_ids(dense), OPTIONS), strict=True):
        np.testing.assert_array_equal(one.clusters.members, other.clusters.members)
        torch.testing.assert_close(one.router, other.router, atol=1e-4, rtol=1e-3)


def test_a_recipe_holds_shared_experts_and_default_outputs(graph):
    graph.config.base_fingerprint = "0" * 64
    recipe = read_recipe(write_recipe(recipe_of(graph)))
    assert (recipe.facts.num_shared, recipe.facts.default_rank) == (2, 3)
    for index, layer in enumerate(graph.expert_layers()):
        for name, value in layer.default.named_parameters():
            np.testing.assert_array_equal(recipe.defaults[name][index], value.detach().numpy())


def test_a_saved_graph_opens_with_its_function(graph, tiny_tokenizer, tmp_path: Path):
    save_checkpoint(graph, tiny_tokenizer, tmp_path)
    opened = load_causal_lm(str(tmp_path))
    assert opened.config.num_shared == [2, 2]
    assert logit_difference(opened, graph, random_ids(graph)) < 1e-5


def test_budgets_keep_shared_experts(graph):
    # k = 4 with 2 shared: 2 routed visits of 6 routed experts
    assert scaled_visits(graph, 5) == [3, 3]
    assert scaled_visits(graph, 0) == scaled_visits(graph, 8) == [4, 4]
    assert scaled_visits(graph, 1) == [1, 1]
    assert choose_residents(torch.arange(5.0), 3, 2).tolist() == [True, True, False, False, True]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"num_shared": 5}, "at most as many `shared experts` as the 4"),
        ({"default_rank": -1}, "at least 0, got -1"),
        ({"router": "ridge"}, "`router` to be contribution"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        BootstrapOptions(**{**OPTIONS.__dict__, **changes})


def test_options_that_are_not_given_go_with_the_router():
    layerwise = BootstrapOptions.of_router(256, 576, features=None, num_shared=None, seed=3)
    assert (layerwise.router, layerwise.features) == ("contribution", "gate-activation")
    assert (layerwise.num_shared, layerwise.default_rank, layerwise.seed) == (38, 128, 3)
    plain = BootstrapOptions.of_router(16, 576, router="ridge", default_rank=None)
    assert (plain.features, plain.num_shared, plain.default_rank) == ("gate", 0, 0)
    given = BootstrapOptions.of_router(8, 5, num_shared=0, default_rank=0, features="up", experts_per_token=1)
    assert (given.num_shared, given.default_rank, given.features) == (0, 0, "up")
    assert (
        BootstrapOptions.of_router(2, 5).num_shared == 0
        and BootstrapOptions.of_router(2, 5).default_rank == 1
    )
