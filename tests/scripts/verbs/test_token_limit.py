"""A tokenizer larger than the embedding: every verb that feeds tokens names the token and ends with exit code 2."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from experts.saliency.measures import save_saliency
from models.checkpoints.save import save_checkpoint
from tests.conftest import tiny_llama
from tests.support.command import assert_refused, run, tree
from tests.support.saliency_samples import random_saliency
from tests.support.tiny_graphs import graph_of

COMMANDS = {
    "bootstrap": ("--model", "dense", "--experts", "4", "--calibration", "t.jsonl", "--out", "out"),
    "evaluate": ("--model", "dense", "--data", "t.jsonl"),
    "evaluate a graph": ("--model", "graph", "--data", "t.jsonl"),
    "generate": ("--model", "dense", "--prompt", "3"),
    "simulate": ("--graph", "graph", "--data", "t.jsonl", "--clients", "1", "--set", "block-size=16"),
    "saliency collect": ("--model", "graph", "--data", "t.jsonl", "--out", "out.npz"),
    "merge": (
        "--model",
        "graph",
        "--data",
        "t.jsonl",
        "--out",
        "out",
        "--saliency",
        "s.npz",
        "--n-prune",
        "1",
    ),
    "experts plan": ("--model", "graph", "--data", "t.jsonl", "--out", "out", "--n-prune", "1"),
}


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_tokenizer) -> Path:
    """Models with an embedding of 30 rows beside a tokenizer of 64; the digits of the text are beyond it."""
    dense = tiny_llama(vocab_size=30)
    dense.save_pretrained(tmp_path / "dense")
    tiny_tokenizer.save_pretrained(tmp_path / "dense")
    (tmp_path / "graph").mkdir()
    save_checkpoint(graph_of(dense, visits=2), tiny_tokenizer, tmp_path / "graph")
    rows = [{"text": "a cat sat", "split": "valid"}, {"text": "a dog ran", "split": "train"}] * 40
    rows += [{"text": "x 3", "split": split} for split in ("train", "valid")]
    (tmp_path / "t.jsonl").write_text("\n".join(map(json.dumps, rows)))
    save_saliency(random_saliency([4, 4]), tmp_path / "s.npz")
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("case", COMMANDS)
def test_a_token_beyond_the_embedding_is_refused_before_anything_is_written(place, capsys, case):
    verb = case.removesuffix(" a graph").split()
    before = tree(place)
    outcome = run(capsys, *verb, *COMMANDS[case])
    assert_refused(outcome, "token ids below 30", "('3')", as_json=False)
    assert tree(place) == before


def test_text_within_the_embedding_is_measured(place, capsys):
    (place / "fine.jsonl").write_text("\n".join([json.dumps({"text": "a cat sat"})] * 40))
    outcome = run(capsys, "evaluate", "--model", "graph", "--data", "fine.jsonl", "--json")
    assert outcome.code == 0 and outcome.json()["tokens"] > 0
