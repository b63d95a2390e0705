from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest

from configs.errors import UserError
from experts.saliency.expert_map import save_expert_map
from experts.saliency.measures import save_saliency
from experts.selection.choice import ExpertChoice, choose_experts, output_directories, read_selection
from experts.selection.expert_list import write_expert_list
from experts.selection.rules import SelectionRules, select_experts
from tests.support.saliency_samples import map_of, saliency_of_scores

SALIENCY = saliency_of_scores([[4.0, 0.1, 3.0, 2.0], [0.1, 2.0, 3.0]])
EXPERTS = [4, 3]


@pytest.fixture
def saliency(tmp_path) -> Path:
    save_saliency(SALIENCY, tmp_path / "s.npz")
    return tmp_path / "s.npz"


def list_of(path: Path, keep: dict[int, list[int]]) -> Path:
    path.write_text(
        json.dumps({"version": "1.0", "keep_map": {str(layer): ids for layer, ids in keep.items()}})
    )
    return path


def kept(choice: ExpertChoice) -> list[list[int]]:
    return [choice.keep_map[layer].tolist() for layer in sorted(choice.keep_map)]


def test_saliency_chooses_with_a_number_and_brings_its_ranks(saliency):
    (choice,) = choose_experts(EXPERTS, expert_list=None, saliency=[saliency], n_prune=1)
    assert kept(choice) == [[0, 2, 3], [1, 2]] and choice.source is None
    assert choice.ranks[0] == {0: 1.0, 1: 4.0, 2: 2.0, 3: 3.0}
    assert {expert: choice.ranks[1][expert] for expert in range(3)} == {0: 3.0, 1: 2.0, 2: 1.0}


def test_every_list_is_a_choice_of_its_own_and_saliency_fills_in(tmp_path, saliency):
    lists = [list_of(tmp_path / "a.json", {0: [0, 1]}), list_of(tmp_path / "b.json", {0: [3], 1: [0]})]
    first, second = choose_experts(EXPERTS, expert_list=lists, saliency=[saliency], n_prune=None)
    assert kept(first) == [[0, 1], [1, 2]] and kept(second) == [[3], [0]]
    assert [choice.source for choice in (first, second)] == lists
    assert first.loaded[0] == f"Loading expert list from: {lists[0]}"
    assert first.loaded[1].startswith("keeps 4 of 7 experts; not listed, so that saliency decides: layers 1")
    assert second.loaded == (f"Loading expert list from: {lists[1]}", "keeps 2 of 7 experts")
    (alone,) = choose_experts(EXPERTS, expert_list=lists[:1], saliency=None, n_prune=None)
    assert "all experts stay: layers 1" in alone.loaded[1]


def test_the_ranks_of_a_table_come_before_those_of_the_saliency(tmp_path, saliency):
    other = saliency_of_scores([[1.0, 2.0, 3.0, 4.0], [1.0, 2.0, 3.0]])
    csv, _ = write_expert_list(select_experts([other], "reap", SelectionRules(n_prune=1)), tmp_path)
    (choice,) = choose_experts(EXPERTS, expert_list=[csv], saliency=[saliency], n_prune=None)
    assert choice.ranks[0] == {0: 4.0, 1: 3.0, 2: 2.0, 3: 1.0}


def test_layers_are_equalized_on_request_only(tmp_path, saliency):
    uneven = [list_of(tmp_path / "a.json", {0: [0], 1: [0, 1]})]
    files = {"expert_list": uneven, "saliency": [saliency], "n_prune": None}
    assert kept(choose_experts(EXPERTS, **files)[0]) == [[0], [0, 1]]
    assert kept(choose_experts(EXPERTS, **files, equalize=True)[0]) == [[0, 2], [0, 1]]


def test_nothing_to_choose_by_is_refused(tmp_path, saliency):
    for files in (None, []):
        with pytest.raises(UserError, match="got neither"):
            choose_experts(EXPERTS, expert_list=files, saliency=files, n_prune=1)
    with pytest.raises(UserError, match="`n_prune` N with `saliency`"):
        choose_experts(EXPERTS, expert_list=None, saliency=[saliency], n_prune=None)
    with pytest.raises(UserError, match=r"\[4, 4\] experts per layer, got \[4, 3\]"):
        choose_experts([4, 4], expert_list=None, saliency=[saliency], n_prune=1)


def test_outputs_bear_the_names_of_their_lists():
    def choice(name: str) -> ExpertChoice:
        return ExpertChoice({0: np.array([0])}, {}, Path(name))

    out = Path("out")
    assert output_directories([choice("x/a.csv")], out) == [out]
    assert output_directories([choice("x/a.csv"), choice("b.json")], out) == [out / "a", out / "b"]
    with pytest.raises(UserError, match="got a twice"):
        output_directories([choice("a.csv"), choice("a.json")], out)
    with pytest.raises(UserError, match="expected `out` DIR"):
        output_directories([choice("a.csv")], None)


def test_maps_are_read_and_ids_parsed(tmp_path):
    save_expert_map(map_of("safety", [3], {0: [1]}), tmp_path / "safety.json")
    save_expert_map(map_of("domain", [3], {0: [2]}), tmp_path / "domain.json")
    selection = read_selection(
        safety_map=tmp_path / "safety.json",
        domain_map=tmp_path / "domain.json",
        ignore_experts="0..1",
        safety_mode="target",
        n_prune=2,
    )
    assert selection.safety.mask.tolist() == [[False, True, False]]
    assert selection.domain.mask.tolist() == [[False, False, True]]
    assert (selection.ignored, selection.safety_mode, selection.n_prune) == ({0, 1}, "target", 2)


def test_nothing_asked_is_the_default_selection():
    assert read_selection() == SelectionRules()


def test_conflicts_are_refused():
    with pytest.raises(UserError, match="`safety_map`"):
        read_selection(safety_mode="target")


def test_saliency_and_lists_keep_shared_experts(tmp_path):
    save_saliency(replace(SALIENCY, num_shared=(2, 1)), tmp_path / "s.npz")
    options = {"saliency": [tmp_path / "s.npz"], "n_prune": 1, "num_shared": [2, 1]}
    (choice,) = choose_experts(EXPERTS, expert_list=None, **options)
    assert kept(choice) == [[0, 1, 2], [0, 2]]
    path = list_of(tmp_path / "a.json", {0: [0, 2]})
    with pytest.raises(UserError, match=r"a\.json: layer 0: expected the shared experts 0 to 1"):
        choose_experts(EXPERTS, expert_list=[path], **options)
    with pytest.raises(UserError, match=r"\[0, 0\] shared experts per layer, got \[2, 1\]"):
        choose_experts(EXPERTS, expert_list=None, **options | {"num_shared": []})
