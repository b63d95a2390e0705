"""``fedgraft safety-scan`` and ``fedgraft domain-scan`` on a small checkpoint."""

from __future__ import annotations

import json

import numpy as np
import pytest

from experts.saliency.expert_map import load_expert_map
from tests.support.command import assert_refused, run, tree
from tests.support.tiny_moes import saved_moe


@pytest.fixture
def place(tmp_path, tiny_tokenizer):
    saved_moe("qwen3_moe", tmp_path, tiny_tokenizer)
    for name, words in (("one", "aaab bbba abab"), ("two", "8888 9998 8989")):
        rows = [{"text": f"{words} {index}"} for index in range(12)]
        (tmp_path / f"{name}.jsonl").write_text("\n".join(map(json.dumps, rows)))
    return tmp_path


SETS = {"safety-scan": ("--harmful", "--harmless"), "domain-scan": ("--domain", "--general")}


@pytest.mark.parametrize("verb", SETS)
def test_a_scan_flags_experts_of_each_layer_and_writes_the_map(place, capsys, verb):
    one, other = SETS[verb]
    result = run(
        capsys, verb, "--model", place / "qwen3_moe", one, place / "one.jsonl", other, place / "two.jsonl",
        "--out", place / "map.json", "--block-size", 32, "--quantile", 0.75, "--json",
    ).json()  # fmt: skip
    found = load_expert_map(place / "map.json")
    assert found.kind == result["kind"] == verb.partition("-")[0]
    assert {int(layer): experts for layer, experts in result["flagged"].items()} == {
        layer: experts.tolist() for layer, experts in found.flagged.items()
    }
    assert [len(experts) for experts in found.flagged.values()] == [2, 2]
    assert result["decoder_layers"] == [0, 1] and set(result["tokens"]) == {"prompts", "others"}
    assert found.provenance["datasets"] == {
        "prompts": [str(place / "one.jsonl")],
        "others": [str(place / "two.jsonl")],
    }
    statistics = json.loads((place / "map.json").read_text())["statistics"]
    best = np.argmax(found.scores[0])
    assert statistics["frequency"][0][best] > 0 or statistics["activation"][0][best] > 0


def test_the_map_protects_experts_from_pruning(place, capsys):
    model = ["--model", place / "qwen3_moe"]
    sets = ["--harmful", place / "one.jsonl", "--harmless", place / "two.jsonl"]
    outcome = run(capsys, "safety-scan", *model, *sets, "--out", place / "map.json")
    assert outcome.code == 0 and "flagged" in outcome.out
    run(capsys, "saliency", "collect", *model, "--data", place / "two.jsonl", "--out", place / "s.npz")
    result = run(
        capsys, "prune", *model, "--saliency", place / "s.npz", "--n-prune", 6, "--safety-map", place / "map.json",
        "--preview", "--json",
    ).json()  # fmt: skip
    for layer, experts in load_expert_map(place / "map.json").flagged.items():
        assert set(experts.tolist()) <= set(result["keep_map"][str(layer)])


@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_is_refused_before_any_work(place, capsys, as_json):
    before = tree(place)
    sets = ["--domain", place / "one.jsonl", "--general", place / "two.jsonl"]
    base = ["domain-scan", "--model", place / "qwen3_moe", "--out", place / "m.json", *["--json"] * as_json]
    assert_refused(run(capsys, *base, *sets, "--quantile", 1), "quantile", as_json=as_json)
    assert_refused(run(capsys, *base, *sets, "--frequency-weight", -1), "weight", as_json=as_json)
    missing = ["--domain", place / "none.jsonl", "--general", place / "two.jsonl"]
    assert_refused(run(capsys, *base, *missing), "none.jsonl", as_json=as_json)
    assert tree(place) == before
