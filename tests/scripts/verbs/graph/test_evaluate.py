from __future__ import annotations

import json
import math

import pytest
import torch

from federated.data.blocks import pack_blocks
from models.checkpoints.load import load_causal_lm, load_tokenizer
from models.checkpoints.save import cast_weights, save_checkpoint
from models.runtime.perplexity import evaluate_loss
from models.runtime.precision import beats_fp32
from tests.support.command import run

PROSE = [
    f"the {word} cat sat on the mat." for word in ("old", "red", "sad", "big", "shy", "fat", "odd", "new")
] * 3
SUMS = [f"{one} + {two} = {one + two}" for one in range(1, 6) for two in range(1, 6)]


@pytest.fixture
def texts(tmp_path):
    (tmp_path / "prose.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in PROSE))
    (tmp_path / "sums.jsonl").write_text("\n".join(json.dumps({"text": text}) for text in SUMS))
    return tmp_path


def expected(model, documents, block_size=128):
    lm, tokenizer = load_causal_lm(str(model)), load_tokenizer(str(model))
    blocks = pack_blocks(documents, tokenizer, block_size=block_size)
    return evaluate_loss(lm, blocks.input_ids, blocks.labels)


@pytest.mark.parametrize("option", ["--data", "--dataset"])
@pytest.mark.parametrize("kind", ["graph", "dense"])
def test_domains_and_their_whole_are_measured_on_held_out_text(
    texts, capsys, tiny_graph_dir, tiny_llama_dir, kind, option
):
    model = {"graph": tiny_graph_dir, "dense": tiny_llama_dir}[kind]
    outcome = run(
        capsys,
        "evaluate",
        *("--model", model, option, texts / "prose.jsonl", option, texts / "sums.jsonl", "--json"),
    )
    assert outcome.code == 0, outcome.err
    report = outcome.json()
    assert {"perplexity", "tokens", "domains"} <= set(report) and set(report["domains"]) == {"prose", "sums"}
    losses = {"prose": expected(model, PROSE[-2:]), "sums": expected(model, SUMS[-2:])}
    for name, loss in losses.items():
        assert report["domains"][name]["perplexity"] == pytest.approx(loss.perplexity, rel=1e-4)
        assert report["domains"][name]["tokens"] == loss.tokens
    total = losses["prose"] + losses["sums"]
    assert report["tokens"] == total.tokens
    assert report["perplexity"] == pytest.approx(math.exp(total.nll / total.tokens), rel=1e-4)


def test_splits_block_size_and_block_count_are_followed(texts, capsys, tiny_llama_dir):
    command = ("evaluate", "--model", tiny_llama_dir, "--data", texts / "sums.jsonl", "--json")
    for split, documents in (("train", SUMS[:-2]), ("all", SUMS)):
        report = run(capsys, *command, "--split", split, "--block-size", 16).json()
        loss = expected(tiny_llama_dir, documents, 16)
        assert report["tokens"] == loss.tokens
        assert report["perplexity"] == pytest.approx(loss.perplexity, rel=1e-4)
    report = run(capsys, *command, "--split", "all", "--block-size", 16, "--max-blocks", 3).json()
    assert report["tokens"] == 3 * 15


def test_more_experts_per_token_change_the_figure_up_to_the_dense_models(
    texts, capsys, tiny_graph_dir, tiny_llama_dir
):
    def measure(model, *options):
        outcome = run(
            capsys, "evaluate", "--model", model, "--data", texts / "prose.jsonl", *options, "--json"
        )
        return outcome.json()["perplexity"]

    figures = [measure(tiny_graph_dir, "--experts-per-token", count) for count in (1, 2, 4)]
    assert len(set(figures)) == 3 and measure(tiny_graph_dir) == figures[1]
    assert figures[2] == pytest.approx(measure(tiny_llama_dir), rel=1e-4)


def test_a_reader_gets_a_table(texts, capsys, tiny_llama_dir):
    outcome = run(capsys, "evaluate", "--model", tiny_llama_dir, "--data", texts / "sums.jsonl")
    assert outcome.code == 0 and "sums" in outcome.out and "perplexity" in outcome.out
    assert "evaluating domains" in outcome.err


def test_a_text_that_is_all_one_token_gives_no_number_and_valid_json(tmp_path, capsys, tiny_llama_dir):
    (tmp_path / "train.txt").write_text("a b c")
    (tmp_path / "valid.txt").write_text("a")
    outcome = run(
        capsys, "evaluate", "--model", tiny_llama_dir, "--data", tmp_path, "--block-size", 2, "--json"
    )
    assert outcome.code == 0 and outcome.json()["tokens"] == 1


@pytest.mark.parametrize("half_is_faster, expected", [(True, "bf16"), (False, "fp32")])
def test_the_faster_precision_is_taken_and_told(
    monkeypatch, texts, capsys, tiny_graph_dir, half_is_faster, expected
):
    seconds = {torch.bfloat16: 1.0 if half_is_faster else 3.0, torch.float32: 2.0}
    monkeypatch.setattr("models.runtime.precision._seconds", lambda dtype, size: seconds[dtype])
    beats_fp32.cache_clear()
    half = cast_weights(load_causal_lm(str(tiny_graph_dir)), torch.bfloat16)
    save_checkpoint(half, load_tokenizer(str(tiny_graph_dir)), texts / "half")
    command = ("evaluate", "--model", texts / "half", "--data", texts / "prose.jsonl", "--json")
    for options, name in (
        ((), expected),
        (("--precision", "fp32"), "fp32"),
        (("--precision", "bf16"), "bf16"),
    ):
        outcome = run(capsys, *command, *options)
        assert outcome.json()["precision"] == name
        assert f"computing with {name} weights" in outcome.err.splitlines()
    beats_fp32.cache_clear()


def test_weights_are_read_in_the_precision_asked_for(texts, capsys, tiny_graph_dir):
    command = ("evaluate", "--model", tiny_graph_dir, "--data", texts / "prose.jsonl", "--json")

    def perplexity(*options: str) -> float:
        return run(capsys, *command, *options).json()["perplexity"]

    stored, exact, rough = perplexity(), perplexity("--precision", "fp32"), perplexity("--precision", "nf4")
    assert exact == stored and rough != exact  # weights stored in fp32 are not rounded
    assert rough == pytest.approx(exact, rel=0.2)
    for options, words in ((("--precision", "int3"), "precision"), (("--device", "tpu"), "device")):
        refused = run(capsys, *command, *options)
        assert refused.code == 2 and words in refused.json()["error"]


def test_the_loss_is_on_answers_where_asked(tmp_path, capsys, tiny_llama_dir):
    rows = [{"prompt": f"{one} + 1", "completion": f"is {one + 1}"} for one in range(5)]
    (tmp_path / "valid.jsonl").write_text("\n".join(map(json.dumps, rows)))
    command = (
        "evaluate",
        "--model",
        tiny_llama_dir,
        "--data",
        tmp_path / "valid.jsonl",
        "--split",
        "all",
        "--json",
    )
    every, answers = (run(capsys, *command, "--loss-on", loss_on) for loss_on in ("all", "answers"))
    assert "no chat template in the tokenizer" in answers.err
    assert run(capsys, *command).json() == every.json() and every.json()["loss_on"] == "all"
    # Tokens are characters: of "User: 0 + 1", blank line, "Assistant: is 1</s>" the answer are the last five.
    texts = [f"User: {row['prompt']}\n\nAssistant: {row['completion']}</s>" for row in rows]
    lm, tokenizer = load_causal_lm(str(tiny_llama_dir)), load_tokenizer(str(tiny_llama_dir))
    blocks = pack_blocks(texts, tokenizer, block_size=128)
    plain = evaluate_loss(lm, blocks.input_ids, blocks.labels)
    assert every.json()["perplexity"] == pytest.approx(plain.perplexity, rel=1e-4)
    ends = (blocks.input_ids == tokenizer.eos_token_id).flatten().nonzero().flatten()
    labels = torch.full_like(blocks.labels, -100).flatten()
    for end in ends.tolist():
        labels[end - 4 : end + 1] = blocks.input_ids.flatten()[end - 4 : end + 1]
    reference = evaluate_loss(lm, blocks.input_ids, labels.view_as(blocks.labels))
    assert answers.json()["tokens"] == reference.tokens == 5 * 5
    assert answers.json()["perplexity"] == pytest.approx(reference.perplexity, rel=1e-4)


def test_the_loss_on_answers_needs_answers(texts, capsys, tiny_llama_dir):
    command = ("evaluate", "--model", tiny_llama_dir, "--data", texts / "sums.jsonl", "--loss-on", "answers")
    outcome = run(capsys, *command)
    assert outcome.code == 2 and "plain text in" in outcome.err and "sums.jsonl, line 1" in outcome.err
