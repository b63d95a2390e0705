"""Forms in which the configuration of a family holds numbers of experts."""

from __future__ import annotations

import pytest

from models.families.family import MoEFamily


@pytest.mark.parametrize(
    ("per_layer", "counts", "holds"),
    [(True, [3, 5], True), (False, [3, 5], False), (False, [4, 4], True), (False, [4], True)],
)
def test_a_configuration_with_one_number_holds_equal_counts_only(per_layer, counts, holds):
    assert MoEFamily(per_layer=per_layer).holds(counts) is holds


def test_the_value_is_a_list_or_the_common_number():
    assert MoEFamily(per_layer=True).count_value((4, 4)) == [4, 4]
    assert MoEFamily().count_value((4, 4)) == 4


def test_stored_names_of_one_experts_matrices():
    assert MoEFamily(matrices=(("a", "b", "c"), ("w1", "w3", "w2"))).own == (
        r"(?:a|w1)\.weight",
        r"(?:b|w3)\.weight",
        r"(?:c|w2)\.weight",
    )
