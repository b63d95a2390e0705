"""Models that `fedgraft prune` refuses: every verb that works towards it refuses them, too, before it measures."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experts.saliency.measures import save_saliency
from tests.support.command import assert_refused, run, tree
from tests.support.saliency_samples import random_saliency
from tests.support.tiny_moes import saved_moe

MEASURE = {
    "saliency collect": ("--data", "t.jsonl", "--out", "s.npz"),
    "experts plan": ("--data", "t.jsonl", "--out", "out", "--n-prune", "1"),
    "safety-scan": ("--harmful", "t.jsonl", "--harmless", "t.jsonl", "--out", "map.json"),
    "domain-scan": ("--domain", "t.jsonl", "--general", "t.jsonl", "--out", "map.json"),
    "merge": ("--data", "t.jsonl", "--saliency", "given.npz", "--n-prune", "1", "--out", "out"),
}


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_tokenizer) -> Path:
    """A mixture of experts that its configuration calls quantized, which transformers would open."""
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    config = json.loads((source / "config.json").read_text())
    (source / "config.json").write_text(json.dumps(config | {"quantization_config": {"quant_method": "fp8"}}))
    rows = [{"text": "a cat", "split": split} for split in ("train", "valid")] * 9
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_saliency(random_saliency([4, 4], model="mixtral"), tmp_path / "given.npz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def refusal(capsys) -> str:
    """What `fedgraft prune` says."""
    outcome = run(
        capsys, "prune", "--model", "mixtral", "--saliency", "given.npz", "--n-prune", 1, "--out", "out"
    )
    assert_refused(outcome, "not quantized", as_json=False)
    return outcome.err


@pytest.mark.parametrize("verb", MEASURE)
def test_measurements_say_what_prune_says_and_write_nothing(place, capsys, monkeypatch, verb):
    expected, before = refusal(capsys), tree(place)
    monkeypatch.setattr("models.checkpoints.load.load_causal_lm", lambda *_, **__: pytest.fail("opened"))
    outcome = run(capsys, *verb.split(), "--model", "mixtral", *MEASURE[verb])
    assert (outcome.code, outcome.err) == (2, expected)
    assert tree(place) == before


def test_a_selection_says_what_prune_says_unless_it_only_ranks(place, capsys):
    command = ("experts", "select", "--saliency", "given.npz", "--out", "list", "--n-prune", 1)
    outcome = run(capsys, *command)
    assert (outcome.code, outcome.err) == (2, refusal(capsys)) and not Path("list").exists()
    assert run(capsys, *command, "--action", "analyze").code == 0


def test_a_selection_needs_no_model(place, capsys):
    save_saliency(random_saliency([4, 4], model="elsewhere"), place / "other.npz")
    command = ("experts", "select", "--saliency", "other.npz", "--out", "list", "--n-prune", 1)
    assert run(capsys, *command).code == 0
