"""The verbs for experts, one after the other, on a graph with shared experts and default outputs."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.output import write_json
from models.checkpoints.load import load_graph
from tests.support.command import assert_refused, run

SHARED = {0, 1}


@pytest.fixture(scope="module")
def data(tmp_path_factory) -> Path:
    path = tmp_path_factory.mktemp("texts") / "t.jsonl"
    rows = [
        {"text": text * 3, "split": split} for split in ("train", "valid") for text in ("a cat. ", "1+2 ")
    ]
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


def result(capsys, *arguments: object) -> dict:
    outcome = run(capsys, *arguments, "--json")
    assert outcome.code == 0, outcome.err
    return outcome.json()


def test_saliency_select_prune_merge_and_export(capsys, tmp_path, shared_graph_dir, data):
    graph, text = ("--model", shared_graph_dir), ("--data", data, "--block-size", 16)
    result(capsys, "saliency", "collect", *graph, *text, "--out", tmp_path / "s.npz")
    shown = result(capsys, "saliency", "show", tmp_path / "s.npz")
    assert [layer["shared"] for layer in shown["layers"]] == [2, 2]
    assert "8 (2 shared)" in run(capsys, "saliency", "show", tmp_path / "s.npz").out
    saliency = ("--saliency", tmp_path / "s.npz")
    chosen = result(capsys, "experts", "select", *saliency, "--n-prune", 3, "--out", tmp_path / "list")
    pruned = result(capsys, "prune", *graph, "--expert-list", chosen["csv"], "--out", tmp_path / "pruned")
    for layer in ("0", "1"):
        assert len(pruned["removed"][layer]) == 3 and not SHARED & set(pruned["removed"][layer])
    opened = load_graph(str(tmp_path / "pruned"))
    assert opened.config.num_experts == [5, 5] and opened.config.default_experts == [8, 8]
    merged = result(
        capsys, "merge", *graph, *text, "--expert-list", chosen["csv"], "--out", tmp_path / "merged"
    )
    assert all(groups[:2] == [[0], [1]] for groups in merged["groups"].values())
    evaluated = [
        result(capsys, "evaluate", "--model", tmp_path / name, *text)["perplexity"]
        for name in ("pruned", "merged")
    ]
    expected = [merged["perplexity"][name] for name in ("pruned", "merged")]
    assert evaluated == pytest.approx(expected, rel=1e-3)
    dense = result(capsys, "export", *graph, "--out", tmp_path / "dense")
    assert dense["exact"] and dense["max_logit_difference"] < 1e-4
    dense = result(capsys, "export", "--model", tmp_path / "pruned", "--out", tmp_path / "approximate")
    assert dense["not_representable"] == ["default outputs in place of removed experts: layers 0, 1"]


def test_plans_and_scans_name_routed_experts_only(capsys, tmp_path, shared_graph_dir, data):
    graph, text = ("--model", shared_graph_dir), ("--data", data, "--block-size", 16)
    planned = result(capsys, "experts", "plan", *graph, *text, "--n-prune", 2, "--out", tmp_path / "plan")
    for step in planned["steps"]:
        assert step["expert"] not in SHARED and step["into"] not in SHARED
    scan = ("--harmful", data, "--harmless", data, "--quantile", 0.5, "--block-size", 16)
    scanned = result(capsys, "safety-scan", *graph, *scan, "--out", tmp_path / "map.json")
    assert not any(SHARED & set(experts) for experts in scanned["flagged"].values())


def test_more_than_the_routed_experts_and_a_list_without_a_shared_one_are_refused(
    capsys, tmp_path, shared_graph_dir, data
):
    graph = ("--model", shared_graph_dir, "--out", tmp_path / "out")
    write_json(tmp_path / "list.json", {"version": "1.0", "keep_map": {"1": [0, 2, 3]}})
    outcome = run(capsys, "prune", *graph, "--expert-list", tmp_path / "list.json")
    assert_refused(outcome, "layer 1: expected the shared experts 0 to 1", "removes 1;", as_json=False)
    text = ("--data", data, "--block-size", 16)
    outcome = run(capsys, "experts", "plan", *graph, *text, "--n-prune", 11)
    assert_refused(outcome, "at most 10 experts in the whole model", as_json=False)
    assert not (tmp_path / "out").exists()
