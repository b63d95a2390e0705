from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest

from experts.saliency.expert_map import save_expert_map
from experts.saliency.measures import save_saliency
from experts.selection.expert_list import load_expert_list
from tests.support.command import assert_refused, run, tree
from tests.support.saliency_samples import map_of, random_saliency, saliency_of_scores

SHAPE = [8, 8]
SELECT = ("experts", "select", "--saliency", "a.npz", "--out", "list")


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with saliency (the best expert first in every layer) and maps."""
    save_saliency(saliency_of_scores([[8, 7, 6, 5, 4, 3, 2, 1]] * 2), tmp_path / "a.npz")
    save_saliency(saliency_of_scores([[1, 7, 6, 5, 4, 3, 2, 8]] * 2), tmp_path / "b.npz")
    save_saliency(random_saliency([8, 7]), tmp_path / "other.npz")
    save_expert_map(map_of("safety", SHAPE, {0: [7]}), tmp_path / "safety.json")
    save_expert_map(map_of("domain", SHAPE, {1: [6]}), tmp_path / "domain.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def removed(path: str | Path = "list/filtered_experts.json") -> list[list[int]]:
    kept = load_expert_list(Path(path))
    return [sorted(set(range(8)) - set(kept[layer].tolist())) for layer in kept]


@pytest.mark.parametrize("option", ["--out", "--output"])
def test_select_writes_both_files_and_tells_the_counts(place, capsys, option):
    outcome = run(
        capsys, "experts", "select", "--saliency", "a.npz", "--n-prune", 3, option, "new/list", "--json"
    )
    result = outcome.json()
    assert outcome.code == 0 and outcome.err == ""
    assert result["csv"] == "new/list/filtered_experts.csv" and result["total_kept"] == 10
    assert result["json"] == "new/list/filtered_experts.json" and result["total_pruned"] == 6
    assert removed(result["csv"]) == removed(result["json"]) == [[5, 6, 7], [5, 6, 7]]
    with Path(result["csv"]).open() as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16 and list(rows[0]) == ["layer", "expert", "rank_sum", "action"]
    assert rows[5] == {"layer": "0", "expert": "5", "rank_sum": "6", "action": "prune"}
    assert sorted(path.name for path in Path("new/list").iterdir()) == [
        "filtered_experts.csv",
        "filtered_experts.json",
    ]


def test_every_option_arrives(place, capsys):
    arguments = ("--saliency", "b.npz", "--metric", "ean", "--selection-mode", "model_wide", "--action", "merge",
                 "--n-prune", 4, "--min-rank", 5, "--max-rank", 29, "--min-experts-per-layer", 2, "--strategy",
                 "strided", "--safety-map", "safety.json", "--safety-mode", "protect", "--domain-map", "domain.json",
                 "--domain-mode", "protect", "--ignore-experts", "4..5")  # fmt: skip
    assert run(capsys, *SELECT, *arguments, "--json").json()["total_pruned"] == 4
    written = json.loads(Path("list/filtered_experts.json").read_text())
    assert written["source"] == {
        "files": ["a.npz", "b.npz"],
        "metric": "ean",
        "selection_mode": "model_wide",
        "action_mode": "merge",
    }
    assert written["filters"] == {"min_rank": 5.0, "max_rank": 29.0, "n_prune": 4}
    gone = removed()
    assert not {4, 5} & {*gone[0], *gone[1]} and 7 not in gone[0] and 6 not in gone[1]
    assert "merge" in Path("list/filtered_experts.csv").read_text()


def test_several_files_count_by_their_ranks(place, capsys):
    run(capsys, *SELECT, "--saliency", "b.npz", "--n-prune", 1)
    with Path("list/filtered_experts.csv").open() as file:
        ranks = [float(row["rank_sum"]) for row in csv.DictReader(file)][:8]
    assert ranks == [9, 4, 6, 8, 10, 12, 14, 9] and removed() == [[6], [6]]


def test_targeted_experts_go_first(place, capsys):
    save_expert_map(map_of("safety", SHAPE, {0: [1]}), place / "safety.json")
    run(capsys, *SELECT, "--n-prune", 1, "--safety-map", "safety.json", "--safety-mode", "target")
    assert removed() == [[1], [7]]


def test_a_reader_sees_what_goes(place, capsys):
    outcome = run(capsys, *SELECT, "--n-prune", 2)
    assert outcome.code == 0 and outcome.err == "" and outcome.out.count("7, 6") == 2
    assert "keeps 12 experts, removes 4" in outcome.out and "filtered_experts.csv" in outcome.out


def test_analyze_keeps_all_and_says_that_n_prune_is_ignored(place, capsys):
    outcome = run(capsys, *SELECT, "--action", "analyze", "--n-prune", 2, "--json")
    assert outcome.json()["total_pruned"] == 0 and len(outcome.err.splitlines()) == 1
    assert outcome.err.startswith("fedgraft: warning: ") and "--n-prune" in outcome.err


def test_pruning_nothing_is_said(place, capsys):
    outcome = run(capsys, *SELECT, "--json")
    assert outcome.json()["total_pruned"] == 0 and "nothing to prune" in outcome.err
    assert run(capsys, *SELECT, "--overwrite", "--action", "analyze").err == ""


def test_a_map_of_another_version_is_a_warning_of_one_line(place, capsys):
    path = place / "safety.json"
    path.write_text(path.read_text().replace('"1.0"', '"2.0"'))
    outcome = run(capsys, *SELECT, "--n-prune", 1, "--safety-map", "safety.json", "--json")
    assert outcome.code == 0 and outcome.json()["total_pruned"] == 2
    assert outcome.err == ("fedgraft: warning: safety.json has version '2.0'; it is read as version '1.0'\n")


def test_a_list_edited_by_hand_is_replaced_only_when_asked(place, capsys):
    run(capsys, *SELECT, "--n-prune", 1)
    before = tree(place)
    outcome = run(capsys, *SELECT, "--n-prune", 2, "--json")
    assert_refused(outcome, "filtered_experts.csv", "--overwrite", as_json=True)
    assert tree(place) == before
    assert run(capsys, *SELECT, "--n-prune", 2, "--overwrite").code == 0 and removed() == [[6, 7], [6, 7]]


BAD = {
    "too many": (("--n-prune", "8"), ["at most 7 experts in layer 0", "got --n-prune 8"]),
    "too many of the model": (("--n-prune", "15", "--selection-mode", "model_wide"), ["at most 14"]),
    "fewer than none": (("--n-prune", "-1"), ["--n-prune"]),
    "an unknown mode": (("--selection-mode", "model-wide"), ["'per_layer', 'model_wide'", "'model-wide'"]),
    "an unknown action": (("--action", "drop"), ["analyze", "'drop'"]),
    "an unknown strategy": (("--strategy", "top"), ["strided", "'top'"]),
    "an unknown metric": (("--metric", "loss"), ["'loss'"]),
    "saliency of another model": (("--saliency", "other.npz"), ["one model"]),
    "saliency that is not there": (("--saliency", "absent.npz"), ["absent.npz"]),
    "a map that is not there": (("--safety-map", "absent.json"), ["absent.json", "not there"]),
    "a map of another kind": (("--domain-map", "safety.json"), ["kind domain", "safety"]),
    "a target without a map": (("--safety-mode", "target"), ["--safety-map"]),
    "no expert ids": (("--ignore-experts", "1-3"), ["250..255", "1-3"]),
    "expert ids beyond the model": (("--ignore-experts", "7..8"), ["experts 0 to 7", "got 8"]),
    "ranks the wrong way round": (("--min-rank", "5", "--max-rank", "4"), ["--min-rank"]),
    "a file as output": (("--out", "a.npz"), ["a.npz"]),
}


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(place, capsys, case, as_json):
    arguments, words = BAD[case]
    before = tree(place)
    outcome = run(capsys, *SELECT, *arguments, *(["--json"] if as_json else []))
    assert_refused(outcome, *words, as_json=as_json)
    assert tree(place) == before


def test_saliency_is_needed(place, capsys):
    assert_refused(run(capsys, "experts", "select", "--out", "list"), "--saliency", as_json=False)


def test_the_command_explains_itself(capsys):
    assert "select" in run(capsys, "experts").out
    assert "--n-prune" in run(capsys, "experts", "select", "--help").out
