"""``fedgraft merge`` on small checkpoints."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import load_file, save_file

from experts.saliency.measures import save_saliency
from models.checkpoints import load
from models.checkpoints.load import load_causal_lm
from models.moe.views import moe_layers
from tests.support.command import assert_refused, run, tree
from tests.support.saliency_samples import random_saliency
from tests.support.tiny_moes import saved_moe


@pytest.fixture
def text(tmp_path):
    rows = [{"text": f"the {word} of a {word} is {word}s, said the cat."} for word in "abcdefghijklmnopqrst"]
    path = tmp_path / "text.jsonl"
    path.write_text("\n".join(map(json.dumps, rows)))
    return path


@pytest.fixture
def lists(tmp_path):
    """An expert list that keeps 2 of 4 experts in each layer, and one that keeps other numbers per layer."""
    even, uneven = tmp_path / "even.csv", tmp_path / "uneven.csv"
    rows = {even: ({0, 3}, {1, 2}), uneven: ({0, 3}, {0, 1, 2})}
    for path, kept in rows.items():
        lines = ["layer,expert,rank_sum,action"]
        for layer, stay in enumerate(kept):
            lines += [f"{layer},{e},{e + 1},{'keep' if e in stay else 'merge'}" for e in range(4)]
        path.write_text("\n".join(lines) + "\n")
    return {"even": even, "uneven": uneven}


def test_a_merged_mixture_loads_and_tells_what_merging_costs(tmp_path, tiny_tokenizer, text, lists, capsys):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    out = tmp_path / "merged"
    outcome = run(
        capsys, "merge", "--model", source, "--dataset", text, "--expert-list", lists["even"], "--output", out,
        "--block-size", 16, "--json",
    )  # fmt: skip
    result = outcome.json()
    assert result["out"] == str(out) and result["keep_map"] == {"0": [0, 3], "1": [1, 2]}
    assert [sorted(sum(groups, [])) for groups in result["groups"].values()] == [[0, 1, 2, 3]] * 2
    model = load_causal_lm(str(out))
    assert [layer.num_experts for layer in moe_layers(model)] == [2, 2]
    parameters = sum(parameter.numel() for parameter in model.parameters())
    assert result["parameters_after"] == parameters < result["parameters_before"]
    assert result["bytes_after"] == (out / "model.safetensors").stat().st_size < result["bytes_before"]
    assert set(result["perplexity"]) == {"before", "merged", "pruned"} and result["note"] is None
    told = run(
        capsys, "evaluate", "--model", out, "--data", text, "--block-size", 16, "--max-blocks", 64, "--json"
    ).json()
    assert result["perplexity"]["merged"] == pytest.approx(told["perplexity"], rel=1e-4)
    assert f"Loading expert list from: {lists['even']}" in outcome.err


def test_a_merged_model_has_the_configuration_of_the_pruned_one(tmp_path, tiny_tokenizer, text, capsys):
    """Layers behind the last, which transformers does not read, are in neither weights nor configuration."""
    source = saved_moe("glm4_moe", tmp_path, tiny_tokenizer)
    further = {
        f"model.layers.3.mlp.experts.{expert}.up_proj.weight": torch.ones(16, 32) for expert in range(6)
    }
    weights = source / "model.safetensors"
    save_file(load_file(weights) | further, weights, {"format": "pt"})
    config = json.loads((source / "config.json").read_text()) | {"num_nextn_predict_layers": 1}
    (source / "config.json").write_text(json.dumps(config))
    save_saliency(random_saliency([6, 6]), tmp_path / "s.npz")
    choice = ("--model", source, "--saliency", tmp_path / "s.npz", "--n-prune", 2)
    assert run(capsys, "prune", *choice, "--out", tmp_path / "pruned").code == 0
    outcome = run(capsys, "merge", *choice, "--data", text, "--block-size", 16, "--out", tmp_path / "merged")
    assert outcome.code == 0 and "6 tensors of layers that predict further tokens" in outcome.err
    pruned, merged = (
        json.loads((tmp_path / name / "config.json").read_text()) for name in ("pruned", "merged")
    )
    assert merged == pruned == config | {"n_routed_experts": 4, "num_nextn_predict_layers": 0}
    assert not [name for name in load_file(tmp_path / "merged" / "model.safetensors") if ".layers.3." in name]


def test_a_graph_merges_by_saliency_into_layers_of_their_own_size(tmp_path, tiny_graph_dir, text, capsys):
    saliency, out = tmp_path / "s.npz", tmp_path / "merged"
    assert (
        run(capsys, "saliency", "collect", "--model", tiny_graph_dir, "--data", text, "--out", saliency).code
        == 0
    )
    outcome = run(
        capsys, "merge", "--model", tiny_graph_dir, "--data", text, "--saliency", saliency, "--n-prune", 3,
        "--model-wide", "--out", out, "--average", "plain", "--similarity-mode", "average",
    )  # fmt: skip
    assert outcome.code == 0, outcome
    assert "share nothing by construction" in " ".join(outcome.out.split())
    graph = load_causal_lm(str(out))
    assert sum(graph.config.num_experts) == 5 and graph.config.graph_version == 1


def test_a_preview_writes_nothing(tmp_path, tiny_tokenizer, text, lists, capsys):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    before = tree(tmp_path)
    outcome = run(
        capsys,
        "merge",
        "--model",
        source,
        "--data",
        text,
        "--expert-list",
        lists["even"],
        "--preview",
        "--json",
    )
    assert outcome.json()["out"] is None and outcome.json()["keep_map"] == {"0": [0, 3], "1": [1, 2]}
    assert tree(tmp_path) == before


def test_several_lists_make_several_outputs(tmp_path, tiny_tokenizer, text, lists, capsys):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    result = run(
        capsys, "merge", "--model", source, "--data", text, "--expert-list", lists["even"], "--expert-list",
        lists["uneven"], "--equalize", "--out", tmp_path / "out", "--block-size", 16, "--json",
    ).json()  # fmt: skip
    assert [each["out"] for each in result["outputs"]] == [
        str(tmp_path / "out" / n) for n in ("even", "uneven")
    ]
    for name, count in (("even", 2), ("uneven", 3)):
        assert load_causal_lm(str(tmp_path / "out" / name)).config.num_local_experts == count


def planned(capsys, source, text, out, *options):
    """Result of `fedgraft experts plan` on 16-token blocks."""
    return run(
        capsys, "experts", "plan", "--model", source, "--data", text, "--out", out, "--block-size", 16, "--json",
        *options,
    ).json()  # fmt: skip


def test_a_plan_is_executed_as_it_was_measured(tmp_path, tiny_tokenizer, text, capsys, monkeypatch):
    source, out = saved_moe("mixtral", tmp_path, tiny_tokenizer), tmp_path / "merged"
    plan = planned(capsys, source, text, tmp_path / "plan", "--n-prune", 4, "--min-experts-per-layer", 2)
    assert any(step["action"] == "merge" for step in plan["steps"])
    opened = []
    monkeypatch.setattr(load, "load_causal_lm", lambda *a, **k: opened.append(a) or load_causal_lm(*a, **k))
    outcome = run(
        capsys, "merge", "--model", source, "--data", text, "--plan", plan["plan"], "--out", out, "--block-size", 16,
        "--json",
    )  # fmt: skip
    result = outcome.json()
    assert len(opened) == 1
    perplexity = result["perplexity"]
    assert list(perplexity) == ["before", "merged", "pruned", "planned"]
    assert (
        perplexity["planned"] == plan["perplexity_after"]
        and perplexity["before"] == plan["perplexity_before"]
    )
    assert perplexity["merged"] == pytest.approx(plan["perplexity_after"], rel=1e-6)
    removed = {(str(step["layer"]), step["expert"]) for step in plan["steps"]}
    assert {(layer, expert) for layer, experts in result["removed"].items() for expert in experts} == removed
    told = run(
        capsys, "evaluate", "--model", out, "--data", text, "--block-size", 16, "--max-blocks", 64, "--json"
    ).json()
    assert told["perplexity"] == pytest.approx(plan["perplexity_after"], rel=1e-3)
    assert "measured perplexity" not in outcome.err


def test_a_plan_of_a_graph_is_executed_and_other_text_is_noticed(tmp_path, tiny_graph_dir, text, capsys):
    plan = planned(capsys, tiny_graph_dir, text, tmp_path / "plan", "--n-prune", 3)
    base = ["merge", "--model", tiny_graph_dir, "--data", text, "--plan", plan["plan"], "--json"]
    result = run(capsys, *base, "--out", tmp_path / "out", "--block-size", 16).json()
    assert result["perplexity"]["merged"] == pytest.approx(plan["perplexity_after"], rel=1e-6)
    assert sum(load_causal_lm(str(tmp_path / "out")).config.num_experts) == 5
    other = run(capsys, *base, "--out", tmp_path / "other", "--block-size", 8)
    assert other.code == 0 and "on other text, blocks or precision than the plan's" in other.err
    preview = run(capsys, *base, "--preview").json()
    assert preview["out"] is None and preview["removed"] == result["removed"]


def test_a_plan_beside_another_choice_or_of_uneven_layers_is_refused(
    tmp_path, tiny_tokenizer, text, lists, capsys
):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    plan = planned(capsys, source, text, tmp_path / "plan", "--n-prune", 1)
    before = tree(tmp_path)
    base = ["merge", "--model", source, "--data", text, "--plan", plan["plan"], "--out", tmp_path / "out"]
    assert_refused(run(capsys, *base), "holds one number", "minimum per layer", as_json=False)
    for options in (["--expert-list", lists["even"]], ["--average", "plain"], ["--equalize"]):
        refused = run(capsys, *base, *options)
        assert_refused(refused, f"--plan without {options[0]}", as_json=False)
    assert_refused(run(capsys, *base[:-3], lists["even"], *base[-2:]), "columns step, layer", as_json=False)
    assert tree(tmp_path) == before


def test_the_model_is_loaded_once(tmp_path, tiny_tokenizer, text, lists, capsys, monkeypatch):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    opened = []
    monkeypatch.setattr(load, "load_causal_lm", lambda *a, **k: opened.append(a) or load_causal_lm(*a, **k))
    base = ["merge", "--model", source, "--data", text, "--expert-list", lists["even"], "--block-size", 16]
    result = run(capsys, *base, "--out", tmp_path / "out", "--json").json()
    assert len(opened) == 1
    pruned = ["prune", "--model", source, "--expert-list", lists["even"], "--out", tmp_path / "pruned"]
    assert run(capsys, *pruned).code == 0
    told = run(
        capsys, "evaluate", "--model", tmp_path / "pruned", "--data", text, "--block-size", 16, "--max-blocks", 64,
        "--json",
    ).json()  # fmt: skip
    assert result["perplexity"]["pruned"] == pytest.approx(told["perplexity"], rel=1e-4)


@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_is_refused_and_leaves_nothing(tmp_path, tiny_tokenizer, text, lists, capsys, as_json):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    before = tree(tmp_path)
    base = ["merge", "--model", source, "--data", text, "--out", tmp_path / "out", *["--json"] * as_json]
    assert_refused(run(capsys, *base), "--expert-list", as_json=as_json)
    even = ["--expert-list", lists["even"]]
    assert_refused(run(capsys, *base, *even, "--alignment", "up"), "'up'", as_json=as_json)
    assert_refused(run(capsys, *base, *even, "--average", "mean"), "'mean'", as_json=as_json)
    assert_refused(run(capsys, *base, *even, "--no-refit"), "that is pruning", as_json=as_json)
    refused = run(capsys, "merge", "--model", source, "--expert-list", lists["even"], *["--json"] * as_json)
    assert refused.code == 2 and "--data" in refused.err
    assert tree(tmp_path) == before


def test_unequal_layers_of_a_mixture_and_groups_too_small_are_refused(
    tmp_path, tiny_tokenizer, text, lists, capsys
):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    before = tree(tmp_path)
    base = ["merge", "--model", source, "--data", text, "--out", tmp_path / "out"]
    outcome = run(capsys, *base, "--expert-list", lists["uneven"])
    assert outcome.code == 2 and "--equalize" in outcome.err
    outcome = run(capsys, *base, "--expert-list", lists["even"], "--max-group-size", 1)
    assert outcome.code == 2 and "allow 2" in outcome.err
    assert tree(tmp_path) == before


def test_too_little_room_is_refused_before_the_model_is_opened(
    tmp_path, tiny_tokenizer, text, lists, capsys, little_room, monkeypatch
):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    before = tree(tmp_path)
    monkeypatch.setattr(load, "load_causal_lm", None)
    command = ("merge", "--model", source, "--data", text, "--expert-list", lists["even"])
    outcome = run(capsys, *command, "--out", tmp_path / "merged", "--json")
    assert outcome.code == 2 and "MiB free on the file system of" in outcome.json()["error"]
    assert tree(tmp_path) == before
