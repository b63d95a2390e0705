from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from transformers import AutoModelForCausalLM

from experts.saliency.expert_map import save_expert_map
from experts.saliency.measures import save_saliency
from experts.selection.expert_list import write_expert_list
from experts.selection.rules import SelectionRules, select_experts
from models.checkpoints.load import load_dense, load_graph
from tests.support.command import assert_refused, run, tree
from tests.support.saliency_samples import map_of, saliency_of_scores
from tests.support.tiny_moes import saved_moe

KEYS = {"out", "keep_map", "parameters_before", "parameters_after", "bytes_before", "bytes_after"}
# The worst of layer 0 are 1, 3; of layer 1: 0, 1. Over both layers the worst two are 0:1 and 1:0.
SALIENCY = saliency_of_scores([[4.0, 0.1, 3.0, 2.0], [0.1, 2.0, 3.0, 4.0]])


@pytest.fixture
def moe(tmp_path, tiny_tokenizer) -> Path:
    return saved_moe("mixtral", tmp_path, tiny_tokenizer)


@pytest.fixture
def saliency(tmp_path) -> Path:
    save_saliency(SALIENCY, tmp_path / "s.npz")
    return tmp_path / "s.npz"


def list_of(path: Path, keep: dict[int, list[int]]) -> Path:
    """A JSON expert list."""
    path.write_text(
        json.dumps({"version": "1.0", "keep_map": {str(layer): ids for layer, ids in keep.items()}})
    )
    return path


def experts_of(directory: Path) -> int:
    return AutoModelForCausalLM.from_pretrained(directory).config.num_local_experts


@pytest.mark.parametrize("option", ["--out", "--output"])
def test_an_expert_list_is_applied_and_told(tmp_path, capsys, moe, option):
    listed, out = list_of(tmp_path / "list.json", {0: [0, 2, 3], 1: [1, 2, 3]}), tmp_path / "out"
    outcome = run(capsys, "prune", "--model", moe, "--expert-list", listed, option, out, "--json")
    report = outcome.json()
    assert outcome.code == 0 and set(report) >= KEYS
    assert report["out"] == str(out) and report["keep_map"] == {"0": [0, 2, 3], "1": [1, 2, 3]}
    assert report["removed"] == {"0": [1], "1": [0]} and report["decoder_layers"] == [0, 1]
    assert report["parameters_before"] - report["parameters_after"] == 2 * (3 * 24 * 32 + 32)
    assert report["bytes_after"] == (out / "model.safetensors").stat().st_size < report["bytes_before"]
    assert f"Loading expert list from: {listed}" in outcome.err and "keeps 6 of 8 experts" in outcome.err
    assert experts_of(out) == 3


def test_a_reader_sees_layers_and_sizes(tmp_path, capsys, moe):
    listed = list_of(tmp_path / "list.json", {0: [0, 2, 3], 1: [1, 2, 3]})
    outcome = run(capsys, "prune", "--model", moe, "--expert-list", listed, "--out", tmp_path / "out")
    assert outcome.code == 0 and outcome.out.startswith(f"Loading expert list from: {listed}\nkeeps 6 of 8")
    for words in ("decoder layer", "experts removed", "parameters:", "bytes:", "wrote "):
        assert words in outcome.out


def test_the_csv_of_a_selection_is_applied_as_the_selection_itself(tmp_path, capsys, moe, saliency):
    chosen = select_experts([SALIENCY], "reap", SelectionRules(n_prune=2))
    csv, _ = write_expert_list(chosen, tmp_path)
    by_list = run(
        capsys, "prune", "--model", moe, "--expert-list", csv, "--out", tmp_path / "a", "--json"
    ).json()
    command = (
        "prune",
        "--model",
        moe,
        "--saliency",
        saliency,
        "--n-prune",
        2,
        "--out",
        tmp_path / "b",
        "--json",
    )
    by_saliency = run(capsys, *command).json()
    assert by_list["keep_map"] == by_saliency["keep_map"] == {"0": [0, 2], "1": [2, 3]}
    assert tree(tmp_path / "a") == tree(tmp_path / "b")


def test_options_of_the_selection_reach_it(tmp_path, capsys, moe, saliency):
    save_expert_map(map_of("safety", [4, 4], {0: [1], 1: [1]}), tmp_path / "safe.json")
    command = ("prune", "--model", moe, "--saliency", saliency, "--n-prune", 1, "--preview", "--json")
    protect = ("--safety-map", tmp_path / "safe.json")
    assert run(capsys, *command).json()["removed"] == {"0": [1], "1": [0]}
    assert run(capsys, *command, *protect).json()["removed"] == {"0": [3], "1": [0]}
    assert run(capsys, *command, *protect, "--safety-mode", "target").json()["removed"] == {
        "0": [1],
        "1": [1],
    }
    assert run(capsys, *command, "--ignore-experts", "0..1").json()["removed"] == {"0": [3], "1": [2]}
    assert run(capsys, *command[:6], 2, *command[7:], "--model-wide").json()["removed"] == {
        "0": [1],
        "1": [0],
    }
    assert_refused(run(capsys, *command, "--min-experts-per-layer", 4), as_json=True)
    assert_refused(run(capsys, *command, "--metric", "nonsense"), "nonsense", as_json=True)


def test_several_saliency_files_are_summed_by_rank(tmp_path, capsys, moe, saliency):
    other = saliency_of_scores([[900.0, 800.0, 1.0, 700.0], [5.0, 1.0, 2.0, 3.0]])
    save_saliency(other, tmp_path / "other.npz")
    files = ("--saliency", saliency, "--saliency", tmp_path / "other.npz")
    command = ("prune", "--model", moe, *files, "--n-prune", 1, "--preview", "--json")
    removed = run(capsys, *command).json()["removed"]
    expected = select_experts([SALIENCY, other], "reap", SelectionRules(n_prune=1))
    assert removed == {
        str(layer): sorted({0, 1, 2, 3} - set(kept.tolist())) for layer, kept in expected.keep_map.items()
    }


def test_the_list_wins_and_the_saliency_fills_what_it_leaves_out(tmp_path, capsys, moe, saliency):
    listed = list_of(tmp_path / "list.json", {0: [1, 3]})
    command = (
        "prune",
        "--model",
        moe,
        "--expert-list",
        listed,
        "--saliency",
        saliency,
        "--preview",
        "--json",
    )
    outcome = run(capsys, *command)
    assert outcome.json()["keep_map"] == {"0": [1, 3], "1": [2, 3]}
    assert "not listed, so that saliency decides: layers 1" in outcome.err and "warning" not in outcome.err


def test_what_means_nothing_beside_a_list_is_ignored_with_a_warning(tmp_path, capsys, moe):
    listed = list_of(tmp_path / "list.json", {0: [1, 3], 1: [0, 1]})
    command = ("prune", "--model", moe, "--expert-list", listed, "--preview", "--json")
    outcome = run(capsys, *command, "--n-prune", 3)
    assert outcome.json()["keep_map"] == {"0": [1, 3], "1": [0, 1]}
    assert "fedgraft: warning: --n-prune is ignored beside --expert-list" in outcome.err
    outcome = run(capsys, *command, "--n-prune", 3, "--strategy", "strided")
    assert "--strategy" in outcome.err and "are ignored beside --expert-list" in outcome.err


@pytest.mark.parametrize("as_json", [True, False])
def test_neither_list_nor_saliency_or_no_number_is_bad_input(tmp_path, capsys, moe, saliency, as_json):
    before = tree(tmp_path)
    json_flag = ["--json"] if as_json else []
    command = ("prune", "--model", moe, "--out", tmp_path / "out", *json_flag)
    assert_refused(run(capsys, *command), "--expert-list", "--saliency", as_json=as_json)
    assert_refused(run(capsys, *command, "--n-prune", 1), "got neither", as_json=as_json)
    assert_refused(run(capsys, *command, "--saliency", saliency), "--n-prune", as_json=as_json)
    assert tree(tmp_path) == before


def test_no_output_is_bad_input_unless_it_is_a_preview(tmp_path, capsys, moe, saliency):
    before = tree(tmp_path)
    command = ("prune", "--model", moe, "--saliency", saliency, "--n-prune", 1, "--json")
    assert_refused(run(capsys, *command), "--out DIR", as_json=True)
    report = run(capsys, *command, "--preview").json()
    assert report["out"] is None and report["bytes_after"] < report["bytes_before"]
    outcome = run(capsys, *command[:-1], "--preview", "--out", tmp_path / "out")
    assert "preview: nothing was written" in outcome.out and tree(tmp_path) == before
    written = run(capsys, *command, "--out", tmp_path / "out").json()
    assert {key: written[key] for key in KEYS - {"out"}} == {key: report[key] for key in KEYS - {"out"}}


def test_several_lists_make_several_outputs(tmp_path, capsys, moe):
    small = list_of(tmp_path / "small.json", {0: [0], 1: [3]})
    large = list_of(tmp_path / "large.json", {0: [0, 1, 2], 1: [1, 2, 3]})
    out = tmp_path / "out"
    lists = ("--expert-list", small, "--expert-list", large)
    report = run(capsys, "prune", "--model", moe, *lists, "--out", out, "--json").json()
    assert report["out"] == str(out)
    assert [each["out"] for each in report["outputs"]] == [str(out / "small"), str(out / "large")]
    assert all(set(each) >= KEYS for each in report["outputs"])
    assert (experts_of(out / "small"), experts_of(out / "large")) == (1, 3)
    assert run(capsys, "prune", "--model", moe, *lists, "--preview", "--json").json()["out"] is None


def test_no_output_is_written_where_one_of_several_lists_does_not_fit(tmp_path, capsys, moe):
    good = list_of(tmp_path / "good.json", {0: [0, 1], 1: [0, 1]})
    bad = list_of(tmp_path / "bad.json", {0: [0, 1], 1: [0, 9]})
    (tmp_path / "twin").mkdir()
    twin = list_of(tmp_path / "twin" / "good.json", {0: [0], 1: [0]})
    before = tree(tmp_path)
    command = ("prune", "--model", moe, "--out", tmp_path / "out", "--json", "--expert-list", good)
    assert_refused(run(capsys, *command, "--expert-list", bad), "bad.json", "got 9", as_json=True)
    outcome = run(capsys, *command, "--expert-list", twin)
    assert outcome.code == 2 and "good twice" in outcome.json()["error"]
    assert tree(tmp_path) == before


def test_unequal_layers_are_refused_or_equalized(tmp_path, capsys, moe, saliency):
    command = (
        "prune",
        "--model",
        moe,
        "--saliency",
        saliency,
        "--n-prune",
        3,
        "--model-wide",
        "--preview",
        "--json",
    )
    outcome = run(capsys, *command)
    assert_refused(outcome, "layers", "mixtral", "--equalize", as_json=True)
    report = run(capsys, *command, "--equalize").json()
    assert report["keep_map"] == {"0": [0, 2, 3], "1": [1, 2, 3]}


def test_equalizing_a_list_needs_ranks(tmp_path, capsys, moe, saliency):
    uneven = list_of(tmp_path / "list.json", {0: [0, 1, 2], 1: [0]})
    command = ("prune", "--model", moe, "--expert-list", uneven, "--preview", "--json", "--equalise")
    assert_refused(run(capsys, *command), "ranks to equalize layer 1", "--saliency", as_json=True)
    assert run(capsys, *command, "--saliency", saliency).json()["keep_map"]["1"] == [0, 2, 3]
    csv, _ = write_expert_list(
        select_experts([SALIENCY], "reap", SelectionRules(n_prune=3, model_wide=True)), tmp_path
    )
    table = ("prune", "--model", moe, "--expert-list", csv, "--preview", "--json", "--equalize")
    assert run(capsys, *table).json()["keep_map"] == {"0": [0, 2, 3], "1": [1, 2, 3]}


def test_saliency_of_another_model_is_refused(tmp_path, capsys, moe):
    save_saliency(saliency_of_scores([[1.0, 2.0, 3.0], [1.0, 2.0, 3.0]]), tmp_path / "s.npz")
    command = ("prune", "--model", moe, "--saliency", tmp_path / "s.npz", "--out", tmp_path / "out", "--json")
    assert_refused(run(capsys, *command, "--n-prune", 1), "[4, 4]", "[3, 3]", as_json=True)


def test_a_dense_model_is_refused(tmp_path, capsys, saliency, tiny_llama_dir):
    command = (
        "prune",
        "--model",
        tiny_llama_dir,
        "--saliency",
        saliency,
        "--n-prune",
        1,
        "--out",
        tmp_path / "out",
    )
    assert_refused(run(capsys, *command, "--json"), "mixture of experts", "llama", as_json=True)


def test_a_used_output_is_replaced_only_when_told(tmp_path, capsys, moe, saliency):
    out = tmp_path / "out"
    out.mkdir()
    (out / "notes.txt").write_text("mine")
    before = tree(tmp_path)
    command = ("prune", "--model", moe, "--saliency", saliency, "--n-prune", 1, "--out", out, "--json")
    assert_refused(run(capsys, *command), "--overwrite", as_json=True)
    assert tree(tmp_path) == before
    assert run(capsys, *command, "--overwrite").code == 0 and not (out / "notes.txt").exists()


def test_a_clamped_k_is_told(tmp_path, capsys, moe, saliency):
    command = (
        "prune",
        "--model",
        moe,
        "--saliency",
        saliency,
        "--n-prune",
        3,
        "--out",
        tmp_path / "out",
        "--json",
    )
    outcome = run(capsys, *command)
    assert "fedgraft: warning: num_experts_per_tok goes from 2 to 1" in outcome.err
    assert outcome.json()["warnings"] == [
        "num_experts_per_tok goes from 2 to 1, as many experts as can be chosen"
    ]


def test_our_graph_may_keep_different_numbers_and_still_leaves_as_dense(
    tmp_path, capsys, saliency, tiny_graph_dir
):
    out = tmp_path / "out"
    command = ("prune", "--model", tiny_graph_dir, "--saliency", saliency, "--n-prune", 3, "--model-wide")
    report = run(capsys, *command, "--out", out, "--json").json()
    graph = load_graph(str(out))
    kept = [len(ids) for ids in report["keep_map"].values()]
    assert graph.config.num_experts == kept and sum(kept) == 5 and kept[0] != kept[1]
    parameters = sum(values.numel() for values in graph.parameters())
    assert report["parameters_after"] == parameters
    export = run(capsys, "export", "--model", out, "--to", "dense", "--out", tmp_path / "dense", "--json")
    assert export.code == 0 and export.json()["max_logit_difference"] < 1e-4
    assert load_dense(str(tmp_path / "dense")).config.intermediate_size == 16 * max(kept)
    layer = graph.expert_layers()[0]
    assert np.array_equal(
        layer.neurons, load_graph(str(tiny_graph_dir)).expert_layers()[0].neurons[report["keep_map"]["0"]]
    )


def test_nothing_to_remove_is_a_warning(tmp_path, capsys, moe, saliency):
    outcome = run(
        capsys, "prune", "--model", moe, "--saliency", saliency, "--n-prune", 0, "--out", tmp_path / "all"
    )
    assert outcome.code == 0 and experts_of(tmp_path / "all") == 4
    assert "warning: nothing to remove with --n-prune 0: all experts stay" in outcome.err
    listed = list_of(tmp_path / "list.json", {0: [0, 1, 2, 3], 1: [0, 1, 2, 3]})
    outcome = run(capsys, "prune", "--model", moe, "--expert-list", listed, "--preview")
    assert outcome.code == 0 and f"nothing to remove with {listed}: all experts stay" in outcome.err


def test_too_little_room_is_refused_before_the_first_of_several_outputs(
    tmp_path, capsys, moe, saliency, little_room
):
    before = tree(tmp_path)
    command = ("prune", "--model", moe, "--saliency", saliency, "--n-prune", 1, "--out", tmp_path / "out")
    assert_refused(run(capsys, *command), "MiB free on the file system of", as_json=False)
    assert tree(tmp_path) == before
