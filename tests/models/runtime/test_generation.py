from __future__ import annotations

import pytest
import torch
from transformers import TextStreamer

from configs.errors import UserError
from models.runtime.generation import continue_prompt
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, with_random_gains


@pytest.fixture(scope="module")
def graph():
    return with_random_gains(graph_of(visits=2))


def greedy(model, tokenizer, prompt: str, count: int) -> list[int]:
    """Tokens after BOS and the prompt, taken one by one; ends at EOS, which is left out."""
    ids = torch.tensor([[tokenizer.bos_token_id, *tokenizer(prompt, add_special_tokens=False)["input_ids"]]])
    start = ids.shape[1]
    with torch.no_grad():
        for _ in range(count):
            best = model(input_ids=ids).logits[:, -1].argmax(-1, keepdim=True)
            if best.item() == tokenizer.eos_token_id:
                break
            ids = torch.cat([ids, best], -1)
    return ids[0, start:].tolist()


@pytest.mark.parametrize("prompt", ["once upon", "3 + 4 = ", ""])
def test_greedy_text_is_the_likeliest_token_each_time(graph, tiny_tokenizer, prompt):
    for model in (graph, tiny_llama()):
        text = continue_prompt(model, tiny_tokenizer, prompt, max_new_tokens=20, temperature=0)
        expected = greedy(model, tiny_tokenizer, prompt, 20)
        assert text == tiny_tokenizer.decode(expected, skip_special_tokens=True)


def test_sampling_follows_the_seed_and_the_temperature(graph, tiny_tokenizer):
    def sample(seed, temperature):
        torch.manual_seed(seed)
        return continue_prompt(graph, tiny_tokenizer, "a", max_new_tokens=30, temperature=temperature)

    assert sample(1, 1.0) == sample(1, 1.0) != sample(2, 1.0)
    coldest = continue_prompt(graph, tiny_tokenizer, "a", max_new_tokens=30, temperature=0)
    assert sample(3, 1e-6) == coldest != sample(3, 2.0)


def test_the_streamer_receives_prompt_and_text(graph, tiny_tokenizer, capsys):
    streamer = TextStreamer(tiny_tokenizer, skip_special_tokens=True)
    text = continue_prompt(graph, tiny_tokenizer, "abc", max_new_tokens=12, temperature=0, streamer=streamer)
    streamed = capsys.readouterr().out
    assert text and streamed.rstrip("\n") == ("abc" + text).rstrip("\n")


def test_text_ends_with_the_context(graph, tiny_tokenizer):
    graph.generation_config.eos_token_id = None
    text = continue_prompt(graph, tiny_tokenizer, "a" * 120, max_new_tokens=50, temperature=0)
    assert len(tiny_tokenizer(text, add_special_tokens=False)["input_ids"]) <= 7


@pytest.mark.parametrize("length", [127, 128, 500])
def test_a_prompt_that_fills_the_context_is_refused(graph, tiny_tokenizer, length):
    with pytest.raises(UserError, match=f"1 to 127 tokens, got {length + 1}"):
        continue_prompt(graph, tiny_tokenizer, "a" * length, max_new_tokens=5, temperature=0)


def test_without_bos_the_prompt_stands_alone_and_must_not_be_empty(graph, tiny_tokenizer):
    class NoBos:
        bos_token_id = eos_token_id = None
        decode = tiny_tokenizer.decode

        def __call__(self, *args, **options):
            return tiny_tokenizer(*args, **options)

    assert continue_prompt(graph, NoBos(), "abc", max_new_tokens=3, temperature=0) is not None
    with pytest.raises(UserError, match="got 0"):
        continue_prompt(graph, NoBos(), "", max_new_tokens=3, temperature=0)
