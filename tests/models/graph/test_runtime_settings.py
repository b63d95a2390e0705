from __future__ import annotations

import pytest
import torch

from configs.errors import UserError
from models.graph.runtime_settings import (
    fewest_residents,
    observing_walks,
    residents,
    scaled_visits,
    set_residents,
    set_visits,
    set_walk,
    unobserved,
    visiting,
    warn_where_fewer_reside,
)
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import (
    graph_of,
    logit_difference,
    random_ids,
    shared_graph_of,
    with_random_gains,
)


@pytest.fixture
def model():
    return with_random_gains(graph_of(num_experts=8, visits=4))


def test_observers_see_every_layer_within_the_block_only(model):
    seen = []
    ids = random_ids(model, 2, 8)
    with observing_walks(model, lambda index: lambda layer, *parts: seen.append((index, layer, parts))):
        model(input_ids=ids, use_cache=False)
    model(input_ids=ids, use_cache=False)
    assert [(index, layer) for index, layer, _ in seen] == list(enumerate(model.expert_layers()))
    scores, walk, weights = seen[0][2]
    assert scores.shape == (16, 8) and walk.experts_TK.shape == weights.shape == (16, 4)


def test_observers_are_taken_off_after_an_error(model):
    def fail(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), observing_walks(model, lambda index: fail):
        model(input_ids=random_ids(model, 1, 4), use_cache=False)
    assert all(layer.observers == [] for layer in model.expert_layers())


def test_nested_observers_are_all_called_the_outermost_first(model):
    seen, ids = [], random_ids(model, 1, 4)

    def watch(name):
        return lambda index: lambda layer, *parts: seen.append((index, name))

    with observing_walks(model, watch("outer")):
        with observing_walks(model, watch("inner")):
            model(input_ids=ids, use_cache=False)
        model(input_ids=ids, use_cache=False)
    assert seen == [(0, "outer"), (0, "inner"), (1, "outer"), (1, "inner"), (0, "outer"), (1, "outer")]


def test_nobody_watches_an_unobserved_block_even_after_an_error(model):
    seen, ids = [], random_ids(model, 1, 4)
    with observing_walks(model, lambda index: lambda layer, *parts: seen.append(index)):
        with pytest.raises(RuntimeError), unobserved(model):
            model(input_ids=ids, use_cache=False)
            raise RuntimeError
        assert seen == []
        model(input_ids=ids, use_cache=False)
    assert seen == [0, 1]


def test_the_walk_is_set_in_every_layer_and_in_the_configuration(model):
    ids = random_ids(model)
    other = with_random_gains(graph_of(num_experts=8, visits=4))
    set_walk(other, "depth-first")
    assert {layer.order for layer in other.expert_layers()} == {"depth-first"}
    assert other.config.walk == "depth-first"
    assert logit_difference(model, other, ids) > 0
    set_walk(other, "best-first")
    assert logit_difference(model, other, ids) == 0


def test_residents_are_all_until_told_otherwise(model):
    assert [held.tolist() for held in residents(model)] == [[True] * 8] * 2
    held = torch.arange(8) < 3
    set_residents(model, [held, None])
    assert [each.tolist() for each in residents(model)] == [held.tolist(), [True] * 8]


def test_only_residents_are_visited_and_a_learning_gate_is_taken_off(model):
    held, visited = torch.arange(8) % 2 == 0, []
    model.expert_layers()[0].residency_gate = torch.ones(8)
    set_residents(model, [held, held])
    assert all(layer.residency_gate is None for layer in model.expert_layers())
    with observing_walks(
        model, lambda index: lambda layer, scores, walk, weights: visited.append(walk.experts_TK)
    ):
        model(input_ids=random_ids(model), use_cache=False)
    assert set(torch.cat(visited).unique().tolist()) == {0, 2, 4, 6}


@pytest.mark.parametrize(
    ("budget", "visits"), [(0, 4), (1, 1), (2, 1), (3, 2), (4, 2), (6, 3), (8, 4), (9, 4), (99, 4)]
)
def test_visits_scale_with_the_budget(model, budget, visits):
    # Half of what is held, as of all: 3 of 8 gives 1.5, rounded to the even 2.
    assert scaled_visits(model, budget) == [visits, visits]


def test_at_least_one_expert_is_visited():
    assert scaled_visits(graph_of(num_experts=8, visits=1), 1) == [1, 1]


def test_set_visits_reaches_every_layer_and_the_configuration():
    model, reference = graph_of(visits=4), graph_of(visits=2)
    set_visits(model, 2)
    assert model.config.experts_per_token == 2
    assert [layer.num_visits for layer in model.expert_layers()] == [2, 2]
    assert logit_difference(model, reference, random_ids(model)) == 0


def test_set_visits_takes_all_of_a_layer_that_has_fewer():
    model = graph_of()
    model.expert_layers()[1].router.weight = torch.nn.Parameter(torch.zeros(3, 32))
    set_visits(model, 4)
    assert [layer.num_visits for layer in model.expert_layers()] == [4, 3]


@pytest.mark.parametrize("count", [0, -1, 5])
def test_more_visits_than_experts_and_none_are_refused(count):
    model = graph_of(visits=3)
    with pytest.raises(UserError, match=f"between 1 and 4, got {count}"):
        set_visits(model, count)
    assert [layer.num_visits for layer in model.expert_layers()] == [3, 3]


def test_a_dense_model_has_no_visits_to_set():
    with pytest.raises(UserError, match="dense model"):
        set_visits(tiny_llama(), 1)


def test_visiting_lasts_as_long_as_its_block_even_through_an_error():
    model = graph_of(visits=3)
    with visiting(model, [1, 4]):
        assert [layer.num_visits for layer in model.expert_layers()] == [1, 4]
    assert [layer.num_visits for layer in model.expert_layers()] == [3, 3]
    with pytest.raises(RuntimeError), visiting(model, [1, 1]):
        raise RuntimeError
    assert [layer.num_visits for layer in model.expert_layers()] == [3, 3]
    with pytest.raises(ValueError), visiting(model, [1]):
        pass
    assert [layer.num_visits for layer in model.expert_layers()] == [3, 3]


def test_a_warning_says_where_fewer_experts_are_held_than_visited(recwarn):
    graph = graph_of(num_experts=4, visits=3)
    warn_where_fewer_reside(graph)
    set_residents(graph, [torch.tensor([True, True, True, False])] * 2)
    warn_where_fewer_reside(graph)
    assert not recwarn.list
    set_residents(graph, [None, torch.tensor([True, True, False, False])])
    with pytest.warns(UserWarning, match="at least 3 experts to visit in layer 1, got 2"):
        warn_where_fewer_reside(graph)
    # And it runs with fewer.
    assert graph(input_ids=random_ids(graph)).logits.isfinite().all()


def test_shared_experts_are_visited_by_every_token():
    model = shared_graph_of()
    assert fewest_residents(model.config) == 2 and fewest_residents(graph_of().config) == 1
    set_visits(model, 2)
    with pytest.raises(UserError, match="between 2 and 8, 2 of them shared, got 1"):
        set_visits(model, 1)
