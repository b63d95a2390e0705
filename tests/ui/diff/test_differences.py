from __future__ import annotations

import json
import re

import numpy as np
import pytest

from configs.errors import UserError
from tests.support.saliency_samples import saliency_of_scores
from tests.ui.run.test_run import ROUNDS
from ui.diff.differences import (
    difference_figures,
    difference_picture,
    largest_changes,
    layers_table,
    relative_difference,
    run_curves,
    runs_table,
)

FIRST, SECOND = saliency_of_scores([[1, 2, 3], [2, 2, 2]]), saliency_of_scores([[3, 2, 1], [4, 4, 4]])


def cells(html: str) -> list[str]:
    return re.findall(r"<td[^>]*>([^<]*)</td>", html)


def test_differences_are_of_scores_over_the_layers_mean():
    found = relative_difference(FIRST, SECOND, "freq")
    np.testing.assert_allclose(found, [[1, 0, -1], [0, 0, 0]])
    assert difference_figures(found) == {
        "mean": 0.0,
        "standard deviation": pytest.approx(3**-0.5),
        "smallest": -1.0,
        "largest": 1.0,
        "risen": 1,
        "fallen": 1,
        "equal": 4,
    }
    with pytest.raises(UserError, match="same experts per layer"):
        relative_difference(FIRST, saliency_of_scores([[1, 2]]), "freq")


def test_fewer_than_ten_experts_are_no_error_and_equal_ones_are_not_listed():
    found = relative_difference(FIRST, SECOND, "freq")
    assert cells(largest_changes(found, [3, 5])) == ["risen", "3", "0", "1", "fallen", "3", "2", "-1"]


def test_the_picture_diverges_from_zero_and_has_both_ranks():
    value = json.loads(difference_picture(FIRST, SECOND, "freq"))
    assert value["diverging"] is True and value["fields"]["rank in the first"][:3] == [3, 2, 1]
    assert value["fields"]["rank in the second"][:3] == [1, 2, 3] and value["fields"]["difference"][:3] == [
        1,
        0,
        -1,
    ]


def test_layers_have_rank_correlation_and_overlap():
    assert cells(layers_table(FIRST, SECOND, "freq")) == ["0", "-1", "0", "1", "-", "1"]


def test_runs_are_compared_by_their_overall_perplexity():
    frame = run_curves({"x": ROUNDS, "y": ROUNDS[:1]})
    assert frame.values.tolist() == [[1, "x", 20.0], [2, "x", 10.0], [1, "y", 20.0]]
    assert cells(runs_table({"x": ROUNDS, "z": []}))[:7] == ["x", "2", "10", "2000", "1000", "7", "5"]
    assert cells(runs_table({"z": []})) == ["z", "0", "-", "0", "0", "0", "0"]
