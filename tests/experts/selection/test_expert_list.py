from __future__ import annotations

import csv
import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from configs.errors import UserError
from experts.selection.expert_list import (
    CSV_FILE,
    JSON_FILE,
    ExpertList,
    check_keep_map,
    complete_keep_map,
    load_expert_list,
    read_ranks,
    write_expert_list,
)
from tests.support.saliency_samples import padded, random_saliency, saliency_of_scores

SOURCE = {"files": ["a.npz"], "metric": "reap", "selection_mode": "per_layer", "action_mode": "prune"}
FILTERS = {"min_rank": None, "max_rank": 7.5, "n_prune": 1}


def list_of(rows: list[str], ranks: list[list[float]]) -> ExpertList:
    """Actions by first letter, e.g. ``["kpk", "mk"]``."""
    names = {"k": "keep", "p": "prune", "m": "merge"}
    actions = np.full((len(rows), max(map(len, rows))), "", dtype="<U5")
    for layer, row in enumerate(rows):
        actions[layer, : len(row)] = [names[letter] for letter in row]
    return ExpertList(padded(ranks), actions, SOURCE, FILTERS)


@st.composite
def expert_lists(draw) -> ExpertList:
    rows = draw(st.lists(st.text("kpm", min_size=1, max_size=6), min_size=1, max_size=4))
    rank = st.integers(2, 40).map(lambda double: double / 2)
    return list_of(rows, [draw(st.lists(rank, min_size=len(row), max_size=len(row))) for row in rows])


def as_lists(keep_map: dict[int, np.ndarray]) -> dict[int, list[int]]:
    return {layer: experts.tolist() for layer, experts in keep_map.items()}


@settings(max_examples=60, deadline=None)
@given(experts=expert_lists())
def test_both_files_say_the_same_and_come_back(tmp_path_factory, experts):
    csv_path, json_path = write_expert_list(experts, tmp_path_factory.mktemp("list"))
    assert as_lists(load_expert_list(csv_path)) == as_lists(experts.keep_map)
    assert as_lists(load_expert_list(json_path)) == as_lists(experts.keep_map)
    assert all(ids.dtype == np.int64 for ids in load_expert_list(json_path).values())
    ranks = read_ranks(csv_path)
    for layer, row in enumerate(experts.rank_sum):
        assert list(ranks[layer].values()) == row[~np.isnan(row)].tolist()
    assert read_ranks(json_path) == {}
    kept = sum(map(len, experts.keep_map.values()))
    assert experts.statistics["total_kept"] == kept
    assert kept + experts.statistics["total_pruned"] == sum(map(len, ranks.values()))


def test_every_present_expert_stands_in_the_table(tmp_path):
    experts = list_of(["kpk", "mk"], [[1, 3, 2], [2.5, 1]])
    csv_path, _ = write_expert_list(experts, tmp_path / "new")
    assert csv_path == tmp_path / "new" / CSV_FILE
    assert csv_path.read_text() == (
        "layer,expert,rank_sum,action\n0,0,1,keep\n0,1,3,prune\n0,2,2,keep\n1,0,2.5,merge\n1,1,1,keep\n"
    )


def test_the_json_has_exactly_the_promised_fields(tmp_path):
    _, json_path = write_expert_list(list_of(["kpk", "mk"], [[1, 3, 2], [2, 1]]), tmp_path)
    assert json_path == tmp_path / JSON_FILE
    assert json.loads(json_path.read_text()) == {
        "version": "1.0",
        "source": SOURCE,
        "filters": FILTERS,
        "keep_map": {"0": [0, 2], "1": [1]},
        "statistics": {"num_layers": 2, "num_experts": 3, "total_kept": 3, "total_pruned": 2},
    }


def test_the_largest_layer_counts_and_not_the_first(tmp_path):
    experts = list_of(["kk", "kkkk"], [[1, 2], [1, 2, 3, 4]])
    assert experts.statistics["num_experts"] == 4


def test_a_list_that_contradicts_itself_is_refused():
    ranks, actions = np.ones((1, 2)), np.asarray([["keep", "prune"]])
    with pytest.raises(UserError, match="ranks and actions"):
        ExpertList(ranks[0], actions, SOURCE, FILTERS)
    with pytest.raises(UserError, match="keep, prune, merge, got"):
        ExpertList(ranks, np.asarray([["keep", "drop"]]), SOURCE, FILTERS)
    for wrong in (np.asarray([[1.0, np.nan]]), ranks):
        with pytest.raises(UserError, match="for every expert that has a rank"):
            ExpertList(wrong, np.asarray([["", "keep"]]), SOURCE, FILTERS)


@pytest.mark.parametrize(
    "keep_map, words",
    [
        ({2: [0]}, "layers 0 to 1, got layer 2"),
        ({-1: [0]}, "got layer -1"),
        ({0: [0, 4]}, "layer 0: expected experts 0 to 3, got 4"),
        ({1: [2]}, "layer 1: expected experts 0 to 1, got 2"),
        ({1: [-1]}, "got -1"),
        ({0: [1, 1]}, "layer 0: expected every expert once"),
        ({0: [1], 1: []}, "layer 1: expected at least one"),
    ],
)
def test_a_list_that_the_model_cannot_apply_is_refused(keep_map, words):
    arrays = {layer: np.asarray(ids, dtype=np.int64) for layer, ids in keep_map.items()}
    for refuse in (check_keep_map, complete_keep_map):
        with pytest.raises(UserError, match=words):
            refuse(arrays, [4, 2])


def test_a_list_that_fits_passes():
    check_keep_map({0: np.asarray([3, 0]), 1: np.asarray([1])}, [4, 2])
    check_keep_map({}, [4, 2])


def test_missing_layers_keep_all_without_saliency():
    completed = complete_keep_map({1: np.asarray([2, 0])}, [2, 3, 4])
    assert as_lists(completed) == {0: [0, 1], 1: [0, 2], 2: [0, 1, 2, 3]} and list(completed) == [0, 1, 2]


def test_missing_layers_keep_their_best_by_saliency():
    saliency = saliency_of_scores([[1, 2, 3, 4], [4, 1, 2, 3], [1, 1, 5, 1], [7, 8]])
    completed = complete_keep_map({0: np.asarray([0, 1])}, [4, 4, 4, 2], saliency, "freq")
    assert as_lists(completed) == {0: [0, 1], 1: [0, 3], 2: [0, 2], 3: [1]}
    one = complete_keep_map({0: np.asarray([3])}, [4, 4, 4, 2], saliency, "freq")
    assert as_lists(one) == {0: [3], 1: [0], 2: [2], 3: [1]}


def test_shared_experts_stay_in_every_list():
    check_keep_map({0: np.asarray([0, 1, 3])}, [4, 4], [2, 0])
    with pytest.raises(
        UserError, match="layer 0: expected the shared experts 0 to 1 .* a list that removes 1;"
    ):
        check_keep_map({0: np.asarray([0, 3])}, [4, 4], [2, 0])
    saliency = saliency_of_scores([[1, 2, 3, 4, 5, 6], [1, 2, 6, 5, 4, 3], [2, 1, 1, 1, 3, 1]])
    # Two of four routed experts in layer 0: two of four and, without shared ones, three of six elsewhere.
    completed = complete_keep_map({0: np.asarray([0, 1, 2, 4])}, [6] * 3, saliency, "freq", [2, 2, 0])
    assert as_lists(completed) == {0: [0, 1, 2, 4], 1: [0, 1, 2, 3], 2: [0, 1, 4]}


def test_saliency_of_another_model_completes_nothing():
    with pytest.raises(UserError, match=r"\[4, 4\].*\[4, 3\]"):
        complete_keep_map({0: np.asarray([0])}, [4, 4], random_saliency([4, 3]))


def test_a_table_edited_by_hand_is_obeyed(tmp_path):
    csv_path, _ = write_expert_list(list_of(["kpk"], [[1, 3, 2]]), tmp_path)
    with csv_path.open() as file:
        rows = list(csv.DictReader(file))
    rows[0]["action"], rows[1]["action"] = "prune", "keep"
    with csv_path.open("w", newline="") as file:
        writer = csv.DictWriter(file, rows[0])
        writer.writeheader()
        writer.writerows(rows)
    assert as_lists(load_expert_list(csv_path)) == {0: [1, 2]}
