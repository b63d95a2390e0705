from __future__ import annotations

import pytest
import torch

from configs.errors import UserError
from models.bootstrap.equality_check import check_equality, first_logits
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, random_ids


def test_a_graph_with_all_experts_active_equals_its_base_whatever_it_visits():
    dense = tiny_llama()
    assert (
        check_equality(first_logits(dense, random_ids(dense)), graph_of(dense, visits=1), random_ids(dense))
        < 1e-6
    )
    half = tiny_llama().bfloat16()
    assert (
        check_equality(
            first_logits(half, random_ids(dense)),
            graph_of(tiny_llama(), visits=1).bfloat16(),
            random_ids(dense),
        )
        < 0.05
    )


def test_the_difference_is_relative_in_norm():
    dense, graph = tiny_llama(), graph_of()
    graph.lm_head.weight.data *= 1.5
    assert check_equality(
        first_logits(dense, random_ids(dense)), graph, random_ids(dense), exact=False
    ) == pytest.approx(0.5, rel=1e-3)


@pytest.mark.parametrize("scale", [1.002, float("nan")])
def test_another_function_is_refused_unless_it_is_asked_for(scale):
    dense, graph = tiny_llama(), graph_of()
    graph.lm_head.weight.data *= scale
    with pytest.raises(UserError, match="all experts active"):
        check_equality(first_logits(dense, random_ids(dense)), graph, random_ids(dense))
    found = check_equality(first_logits(dense, random_ids(dense)), graph, random_ids(dense), exact=False)
    assert found == pytest.approx(scale - 1, rel=1e-2, nan_ok=True)


def test_the_number_of_visited_experts_is_as_before():
    dense, graph = tiny_llama(), graph_of(visits=1)
    before = graph(input_ids=random_ids(dense)).logits
    check_equality(first_logits(dense, random_ids(dense)), graph, random_ids(dense))
    assert torch.equal(graph(input_ids=random_ids(dense)).logits, before)
