from __future__ import annotations

import pytest
import torch

from configs.errors import UserError
from models.runtime.generation import continue_prompt
from tests.conftest import tiny_llama
from tests.support.tiny_moes import saved_moe, tiny_moe
from ui.chat.experts_of_tokens import recording_experts
from ui.chat.generation import Answer, Opened, check_form, open_model, stream_answer

FORM = {"max_new_tokens": 5, "temperature": 0.0, "layer": 1}


@pytest.fixture(scope="module")
def opened(tmp_path_factory, tiny_tokenizer) -> Opened:
    return open_model(saved_moe("mixtral", tmp_path_factory.mktemp("model"), tiny_tokenizer))


def test_the_streamed_text_is_that_of_a_generation_at_once(opened):
    counts = []
    for answer in stream_answer(opened, "abc", **FORM):
        counts.append(len(answer.tokens))
    assert counts == [1, 2, 3, 4, 5]
    expected = continue_prompt(opened.model, opened.tokenizer, "abc", max_new_tokens=5, temperature=0.0)
    assert "".join(answer.tokens) == expected
    assert len(answer.experts) == 5 and answer.rate > 0


def test_recorded_experts_have_the_largest_router_score_of_the_last_token(opened):
    ids = torch.tensor([[0, 5, 9, 7]])
    with recording_experts(opened.model, 1) as experts, torch.no_grad():
        logits = opened.model(ids, output_router_logits=True).router_logits[1]
    assert experts == [int(logits[-1].argmax())]


def test_a_dense_model_has_no_experts(tiny_tokenizer):
    answer = list(stream_answer(Opened(tiny_llama(), tiny_tokenizer), "abc", **FORM))[-1]
    assert len(answer.tokens) == 5 and answer.experts == []


def test_a_closed_stream_ends_the_generation_and_removes_its_hooks(opened):
    stream = stream_answer(opened, "abc", **FORM | {"max_new_tokens": 100})
    next(stream)
    stream.close()
    assert not opened.model._forward_hooks


def test_sampling_repeats_with_its_seed(opened):
    texts = [
        list(stream_answer(opened, "a", **FORM | {"temperature": 2.0}, seed=seed))[-1].tokens
        for seed in (3, 3)
    ]
    assert texts[0] == texts[1]


def test_errors_of_the_generation_are_raised(opened):
    with pytest.raises(UserError, match="prompt of 1 to 127 tokens"):
        list(stream_answer(opened, "a" * 200, **FORM))


def test_shared_experts_color_no_token():
    model = tiny_moe("qwen2_moe")
    with recording_experts(model, 9) as experts, torch.no_grad():
        model(torch.tensor([[1, 2]]))
    assert len(experts) == 1 and 0 <= experts[0] < 6


def test_bad_forms_are_refused():
    for prompt, number, heat, message in (
        ("", 1, 0, "a prompt"),
        ("a", 0, 0, "1 to 4096"),
        ("a", 5000, 0, "got 5000"),
        ("a", 1, 2.5, "temperature from 0 to 2"),
    ):
        with pytest.raises(UserError, match=message):
            check_form(prompt, number, heat)


def test_the_rate_is_tokens_over_seconds():
    assert Answer(["a", "b"], [], 4.0).rate == 0.5 and Answer().rate == 0.0
