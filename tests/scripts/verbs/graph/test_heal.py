from __future__ import annotations

import pytest

from models.checkpoints.load import load_graph
from scripts.verbs.graph.heal import DEFAULT_STEPS
from tests.conftest import tiny_llama
from tests.support.command import assert_refused, run

QUICK = ("--block-size", 32, "--batch-size", 2, "--evaluation-tokens", 256)


@pytest.fixture
def texts(tmp_path):
    for name, text in (("a", "one dog and one cat. "), ("b", "3 + 4 = 7; ")):
        (tmp_path / f"{name}.txt").write_text("\f".join([text * 10] * 12))
    return ("--data", tmp_path / "a.txt", "--data", tmp_path / "b.txt")


@pytest.fixture
def command(texts, tiny_graph_dir, tiny_llama_dir):
    return ("heal", "--model", tiny_graph_dir, "--base", tiny_llama_dir, *texts, *QUICK)


def test_the_json_report_has_the_agreed_keys(tmp_path, capsys, command):
    outcome = run(capsys, *command, "--out", tmp_path / "new", "--steps", 5, "--train", "lora", "--json")
    assert outcome.code == 0, outcome.err
    report = outcome.json()
    assert set(report) == {
        *("out", "perplexity", "logit_difference", "steps", "tokens", "seconds", "core_seconds", "losses"),
        *("evaluation_tokens", "evaluation_seconds", "trained_parameters"),
    }
    assert set(report["perplexity"]) == {"dense", "before", "after"}
    assert set(report["logit_difference"]) == {"before", "after"}
    assert (report["out"], report["steps"], report["tokens"]) == (str(tmp_path / "new"), 5, 5 * 2 * 32)
    assert report["evaluation_tokens"] == 256 and len(report["losses"]) == 5
    assert "healing steps 5/5" in outcome.err and "held-out perplexity 3/3" in outcome.err
    assert load_graph(str(tmp_path / "new")).config.num_experts == [4, 4]


def test_a_reader_gets_perplexities_cost_and_what_is_lost(tmp_path, capsys, command):
    outcome = run(capsys, *command, "--out", tmp_path / "new", "--learning-rate", "1e-3")
    assert outcome.code == 0 and f"{DEFAULT_STEPS} steps" in outcome.out
    for word in ("dense", "before", "after", "core-seconds", "all experts active", "without a recipe"):
        assert word in outcome.out
    assert not list(tmp_path.glob(".new*"))


def test_the_training_text_depends_on_the_seed_and_the_measured_text_does_not(tmp_path, capsys, command):
    reports = []
    for seed in (0, 0, 1):
        out = tmp_path / str(len(reports))
        outcome = run(capsys, *command, "--out", out, "--steps", 2, "--seed", seed, "--json")
        assert outcome.code == 0, outcome.err
        reports.append(outcome.json())
    assert reports[0]["losses"] == reports[1]["losses"] != reports[2]["losses"]
    assert reports[0]["perplexity"]["before"] == reports[2]["perplexity"]["before"]


def test_minutes_are_an_alternative_to_steps(tmp_path, capsys, command):
    outcome = run(capsys, *command, "--out", tmp_path / "new", "--minutes", "0.001", "--json")
    assert outcome.code == 0 and outcome.json()["steps"] >= 1
    both = run(capsys, *command, "--out", tmp_path / "other", "--minutes", 1, "--steps", 1, "--json")
    assert_refused(both, "--steps", "--minutes", as_json=True)


@pytest.mark.parametrize("as_json", [False, True])
def test_unusable_models_are_refused_in_one_line(
    tmp_path, capsys, texts, tiny_graph_dir, tiny_llama_dir, as_json
):
    tiny_llama(vocab_size=80).save_pretrained(tmp_path / "wide")
    flags = ("--json",) if as_json else ()
    for model, base, word in (
        (tiny_llama_dir, tiny_llama_dir, "expert graph"),
        (tiny_graph_dir, tiny_graph_dir, "dense model"),
        (tiny_graph_dir, tmp_path / "wide", "vocab_size"),
        (tiny_graph_dir, tmp_path / "none", "none"),
    ):
        outcome = run(
            capsys, "heal", "--model", model, "--base", base, *texts, "--out", tmp_path / "new", *flags
        )
        assert_refused(outcome, word, as_json=as_json)
    (tmp_path / "new").write_text("a file")
    pair = ("--model", tiny_graph_dir, "--base", tiny_llama_dir)
    assert_refused(
        run(capsys, "heal", *pair, *texts, "--out", tmp_path / "new", *flags), "new", as_json=as_json
    )
