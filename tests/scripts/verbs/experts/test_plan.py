"""``fedgraft experts plan`` on small checkpoints."""

from __future__ import annotations

import csv
import json
from pathlib import Path

import pytest
from transformers import PreTrainedTokenizerFast

from experts.saliency.expert_map import save_expert_map
from experts.selection.expert_list import load_expert_list
from experts.selection.trace_file import COLUMNS
from tests.support.command import assert_refused, run, tree
from tests.support.documents import write_documents
from tests.support.saliency_samples import map_of
from tests.support.tiny_moes import saved_moe

FILES = ["compression_plan.csv", "filtered_experts.csv", "filtered_experts.json"]
PLAN = ("experts", "plan", "--data", "text.jsonl", "--block-size", 16, "--max-blocks", 4)


@pytest.fixture(scope="module")
def checkpoint(tmp_path_factory, tiny_tokenizer: PreTrainedTokenizerFast) -> Path:
    return saved_moe("mixtral", tmp_path_factory.mktemp("moe"), tiny_tokenizer)


@pytest.fixture
def place(tmp_path, monkeypatch, checkpoint):
    """A working directory with text, maps and a tiny Mixtral of 4 experts in each of 2 layers."""
    words = "abcdefghijklmnopqrst"
    write_documents(
        tmp_path / "text.jsonl", [f"the {word} of a {word} is {word}s, said the cat." for word in words]
    )
    (tmp_path / "moe").symlink_to(checkpoint)
    save_expert_map(map_of("safety", [4, 4], {0: [0, 1, 2]}), tmp_path / "safety.json")
    save_expert_map(map_of("domain", [4, 4], {1: [3]}), tmp_path / "domain.json")
    save_expert_map(map_of("safety", [4, 5], {}), tmp_path / "other.json")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("option", ["--out", "--output"])
def test_a_plan_writes_table_and_list_and_tells_every_step(place, capsys, option):
    outcome = run(capsys, *PLAN, "--model", "moe", "--n-prune", 3, option, "new/plan", "--json")
    result = outcome.json()
    assert outcome.code == 0 and sorted(path.name for path in Path("new/plan").iterdir()) == FILES
    assert [Path(result[key]).name for key in ("plan", "csv", "json")] == FILES
    assert (result["total_kept"], result["total_pruned"], len(result["steps"])) == (5, 3, 3)
    assert [step["step"] for step in result["steps"]] == [1, 2, 3]
    with Path(result["plan"]).open() as file:
        rows = list(csv.DictReader(file))
    assert tuple(rows[0]) == COLUMNS and len(rows) == 3
    before = result["perplexity_before"]
    for row, step in zip(rows, result["steps"], strict=True):
        assert float(row["perplexity"]) == step["perplexity"]
        assert step["perplexity_loss"] == pytest.approx(step["perplexity"] - before, abs=1e-9)
        assert step["perplexity"] <= step["other_perplexity"]
        before = step["perplexity"]
    assert result["perplexity_after"] == before
    with Path(result["csv"]).open() as file:
        actions = {(row["layer"], row["expert"]): row["action"] for row in csv.DictReader(file)}
    assert len(actions) == 8
    gone = {(str(step["layer"]), str(step["expert"])): step["action"] for step in result["steps"]}
    assert {place: action for place, action in actions.items() if action != "keep"} == gone
    kept = load_expert_list(Path(result["json"]))
    assert sum(map(len, kept.values())) == 5
    assert {layer: ids.tolist() for layer, ids in load_expert_list(Path(result["csv"])).items()} == {
        layer: ids.tolist() for layer, ids in kept.items()
    }


def test_the_first_perplexity_is_that_of_evaluate_and_pruned_plans_give_what_they_promise(place, capsys):
    result = run(
        capsys, *PLAN, "--model", "moe", "--n-prune", 2, "--max-group-size", 1, "--min-experts-per-layer", 3,
        "--out", "plan", "--json",
    ).json()  # fmt: skip
    # One expert goes in each layer, so that the format holds what is left.
    assert result["equalise"] is False and {step["action"] for step in result["steps"]} == {"prune"}
    pruned = run(
        capsys, "prune", "--model", "moe", "--expert-list", result["csv"], "--out", "small", "--json"
    )
    assert pruned.code == 0, pruned
    for model, key in (("moe", "perplexity_before"), ("small", "perplexity_after")):
        measured = run(
            capsys, "evaluate", "--model", model, "--data", "text.jsonl", "--block-size", 16, "--max-blocks",
            4, "--json",
        ).json()  # fmt: skip
        assert measured["perplexity"] == pytest.approx(result[key], rel=1e-5)


def test_layers_that_differ_are_told_with_what_to_do(place, capsys):
    outcome = run(
        capsys, *PLAN, "--model", "moe", "--n-prune", 1, "--safety-map", "safety.json", "--ignore-experts", "3",
        "--out", "plan",
    )  # fmt: skip
    assert outcome.code == 0 and "--equalize" in outcome.err
    assert "--n-prune 2 --min-experts-per-layer 3" in outcome.err
    assert "keeps 7 experts, removes 1: perplexity" in outcome.out and "filtered_experts.csv" in outcome.out
    prune = (
        "prune",
        "--model",
        "moe",
        "--expert-list",
        "plan/filtered_experts.csv",
        "--out",
        "small",
        "--json",
    )
    refused = run(capsys, *prune)
    assert refused.code == 2 and "--equalize" in refused.json()["error"]
    assert run(capsys, *prune, "--equalize").code == 0


def test_maps_and_ignored_experts_hold(place, capsys):
    result = run(
        capsys, *PLAN, "--model", "moe", "--n-prune", 4, "--safety-map", "safety.json", "--domain-map",
        "domain.json", "--metric", "freq", "--alignment", "none", "--out", "plan", "--json",
    ).json()  # fmt: skip
    kept = load_expert_list(Path(result["csv"]))
    assert kept[0].tolist() == [0, 1, 2] and kept[1].tolist() == [3]
    assert result["equalise"] is True
    assert json.loads(Path(result["json"]).read_text())["source"]["metric"] == "freq"


def test_a_graph_is_planned_and_pruned_without_equalizing(place, tiny_graph_dir, capsys):
    result = run(capsys, *PLAN, "--model", tiny_graph_dir, "--n-prune", 3, "--out", "plan", "--json").json()
    assert result["equalise"] is False and result["total_pruned"] == 3
    pruned = run(
        capsys,
        "prune",
        "--model",
        tiny_graph_dir,
        "--expert-list",
        result["json"],
        "--out",
        "small",
        "--json",
    )
    assert pruned.code == 0 and sum(map(len, pruned.json()["keep_map"].values())) == 5


def test_nothing_to_remove_is_a_warning_and_keeps_all(place, capsys):
    outcome = run(
        capsys, *PLAN, "--model", "moe", "--n-prune", 0, "--split", "all", "--out", "plan", "--json"
    )
    result = outcome.json()
    assert result["steps"] == [] and result["perplexity_after"] == result["perplexity_before"]
    assert (result["total_kept"], result["total_pruned"]) == (8, 0)
    assert "nothing to plan" in outcome.err and "--split all" in outcome.err


def test_files_are_replaced_only_when_asked(place, capsys):
    (place / "plan").mkdir()
    (place / "plan" / "compression_plan.csv").write_text("mine")
    arguments = (*PLAN, "--model", "moe", "--n-prune", 1, "--out", "plan", "--json")
    before = tree(place / "plan")
    assert_refused(run(capsys, *arguments), "compression_plan.csv", "--overwrite", as_json=True)
    assert tree(place / "plan") == before
    assert run(capsys, *arguments, "--overwrite").code == 0


BAD = {
    "too many": (("--n-prune", 7), ["at most 6 experts in the whole model", "--n-prune 7"]),
    "no number": ((), ["--n-prune"]),
    "a number below zero": (("--n-prune", -1), ["--n-prune"]),
    "an unknown metric": (("--n-prune", 1, "--metric", "loss"), ["'loss'", "weighted_freq"]),
    "an unknown alignment": (("--n-prune", 1, "--alignment", "up"), ["'up'", "centroid"]),
    "a map of another model": (("--n-prune", 1, "--safety-map", "other.json"), ["safety map", "scan this model"]),
    "a map that is not there": (("--n-prune", 1, "--domain-map", "absent.json"), ["absent.json"]),
    "experts that are none": (("--n-prune", 1, "--ignore-experts", "x"), ["1,2,250..255"]),
    "experts beyond the model": (("--n-prune", 1, "--ignore-experts", "9"), ["--ignore-experts", "9"]),
    "4 bits": (("--n-prune", 1, "--precision", "nf4"), ["fp32 or bf16", "nf4"]),
    "an unknown split": (("--n-prune", 1, "--split", "tset"), ["--split"]),
    "blocks beyond the context": (("--n-prune", 1, "--block-size", 4096), ["max_position_embeddings"]),
}  # fmt: skip


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(place, capsys, case, as_json):
    arguments, words = BAD[case]
    before = tree(place)
    json_flag = ["--json"] if as_json else []
    outcome = run(capsys, *PLAN, "--model", "moe", "--out", "plan", *arguments, *json_flag)
    assert_refused(outcome, *words, as_json=as_json)
    assert tree(place) == before


def test_a_dense_model_is_refused(place, tiny_llama_dir, capsys):
    outcome = run(capsys, *PLAN, "--model", tiny_llama_dir, "--n-prune", 1, "--out", "plan", "--json")
    assert_refused(outcome, "expected a mixture of experts of type", as_json=True)
    assert not Path("plan").exists()


def test_the_command_explains_itself(capsys):
    told = run(capsys, "experts", "plan", "--help")
    assert told.code == 0 and all(word in told.out for word in ("--n-prune", "--alignment", "--json"))
