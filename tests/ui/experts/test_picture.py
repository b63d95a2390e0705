from __future__ import annotations

import json

from tests.support.saliency_samples import saliency_of_scores
from ui.experts.picture import selection_picture
from ui.experts.selection import SaliencyFile, SelectionForm, select

ONE = SaliencyFile("a.npz", saliency_of_scores([[4, 3, 2, 1], [1, 2, 3, 4]]))
OTHER = SaliencyFile("b.npz", saliency_of_scores([[4, 1, 2, 1], [0, 0, 0, 4]]))


def content(*files: SaliencyFile, **fields) -> dict:
    form = SelectionForm(metric="freq", n_prune=1, **fields)
    return json.loads(selection_picture(select(files, form), files, form))


def test_the_picture_has_rank_score_and_marks_of_every_expert():
    found = content(ONE)
    assert found["marks"] == "kkkppkkk" and found["rows"] == ["0", "1"]
    assert found["fields"]["rank"] == [1, 2, 3, 4, 4, 3, 2, 1] and found["fields"]["freq"] == [
        4,
        3,
        2,
        1,
        1,
        2,
        3,
        4,
    ]
    assert found["fields"]["times the layer's mean"][:4] == [1.6, 1.2, 0.8, 0.4]


def test_two_files_have_a_sum_of_ranks_and_a_score_each():
    found = content(ONE, OTHER)
    assert found["fields"]["rank sum"][:4] == [2, 5.5, 5, 7.5]
    assert found["fields"]["freq of b.npz"] == [4, 1, 2, 1, 0, 0, 0, 4]
    assert found["fields"]["times the layer's mean"][0] == 1.8


def test_a_file_without_any_score_is_drawn_by_rank():
    empty = SaliencyFile("e.npz", saliency_of_scores([[0, 0, 0]]))
    assert content(empty)["marks"] == "kkp"
