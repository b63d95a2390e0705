from __future__ import annotations

import pytest

from models.checkpoints.load import load_causal_lm, load_tokenizer
from models.runtime.generation import continue_prompt
from tests.support.command import run


@pytest.mark.parametrize("kind", ["graph", "dense"])
def test_the_text_is_that_of_the_model_as_json_and_streamed(capsys, tiny_graph_dir, tiny_llama_dir, kind):
    model = {"graph": tiny_graph_dir, "dense": tiny_llama_dir}[kind]
    command = (
        "generate",
        "--model",
        model,
        "--prompt",
        "the cat",
        "--max-new-tokens",
        12,
        "--temperature",
        0,
    )
    lm, tokenizer = load_causal_lm(str(model)), load_tokenizer(str(model))
    text = continue_prompt(lm, tokenizer, "the cat", max_new_tokens=12, temperature=0)
    outcome = run(capsys, *command, "--json")
    assert outcome.code == 0 and outcome.json() == {
        "prompt": "the cat",
        "text": text,
        "precision": "fp32",
    }
    streamed = run(capsys, *command)
    assert streamed.code == 0 and streamed.out.rstrip("\n") == ("the cat" + text).rstrip("\n")


def test_the_seed_decides_what_is_sampled(capsys, tiny_graph_dir):
    texts = [
        run(
            capsys,
            "generate",
            *("--model", tiny_graph_dir, "--prompt", "a", "--seed", seed, "--max-new-tokens", 30, "--json"),
        ).json()["text"]
        for seed in (1, 1, 2)
    ]
    assert texts[0] == texts[1] != texts[2]


def test_an_empty_prompt_starts_from_bos(capsys, tiny_graph_dir):
    outcome = run(
        capsys, "generate", "--model", tiny_graph_dir, "--prompt", "", "--max-new-tokens", 5, "--json"
    )
    assert outcome.code == 0 and outcome.json()["prompt"] == ""
