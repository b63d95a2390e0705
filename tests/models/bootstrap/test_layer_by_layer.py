"""Plans fitted layer by layer: shared experts, routers by contribution, default outputs."""

from pathlib import Path

import numpy as np
import pytest
import torch

from clients.residents.assembler import choose_residents
from configs.errors import UserError
from models.bootstrap.build import build_graph, plan_experts
from models.bootstrap.calibration import hidden_activations, visit_ffn_inputs
from models.bootstrap.layer_by_layer import contribution_router, default_output
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
    router = contribution_router(x_TD, x_TD.square(), torch.arange(6).view(3, 2))
    target = x_TD.square().view(-1, 3, 2).sum(-1).argmax(-1)
    assert ((x_TD @ router.T).argmax(-1) == target).float().mean() > 0.8


def test_an_affine_map_of_low_rank_is_recovered():
    generator = torch.Generator().manual_seed(0)
    x_TD = torch.randn(500, 5, generator=generator)
    wanted = x_TD @ torch.randn(5, 2, generator=generator) @ torch.randn(2, 5, generator=generator) + 3.0
    down, up, bias = default_output(x_TD, wanted, 2, 0.5)
    torch.testing.assert_close(0.5 * (x_TD @ down.T @ up.T + bias), wanted, atol=0.15, rtol=0.05)


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
        ({"num_shared": 4}, "fewer `shared experts` than the 4"),
        ({"default_rank": -1}, "at least 0, got -1"),
        ({"router": "ridge"}, "`router` to be contribution"),
    ],
)
def test_options_that_do_not_go_together_are_refused(changes, message):
    with pytest.raises(UserError, match=message):
        BootstrapOptions(**{**OPTIONS.__dict__, **changes})
