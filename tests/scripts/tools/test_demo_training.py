"""Training loop of the embedded model on a tiny Llama."""

from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig, LlamaForCausalLM

from scripts.tools import demo_training


@pytest.fixture
def model() -> LlamaForCausalLM:
    torch.manual_seed(0)
    sizes = {"hidden_size": 16, "intermediate_size": 32, "num_hidden_layers": 2, "num_attention_heads": 2}
    return LlamaForCausalLM(LlamaConfig(**sizes, vocab_size=320, max_position_embeddings=64))


def test_learning_rate_warms_up_and_decays() -> None:
    rates = [demo_training.learning_rate(step, 100) for step in range(100)]
    assert max(rates) == pytest.approx(demo_training.PEAK_RATE) and rates.index(max(rates)) == 4
    assert rates[:5] == sorted(rates[:5]) and rates[5:] == sorted(rates[5:], reverse=True)
    assert rates[-1] == pytest.approx(0.05 * demo_training.PEAK_RATE, rel=0.1)
    assert demo_training.learning_rate(0, 1) == demo_training.PEAK_RATE


def test_batches_see_every_block_once_and_all_domains_each_time() -> None:
    rows = {name: torch.arange(8).view(8, 1) + 100 * index for index, name in enumerate("abcd")}
    seen = list(demo_training.batches(rows, seed=1))
    assert all(sorted(batch.flatten() // 100) == [0] * 4 + [1] * 4 + [2] * 4 + [3] * 4 for batch in seen)
    assert sorted(torch.cat(seen).flatten().tolist()) == sorted(
        torch.cat(list(rows.values())).flatten().tolist()
    )


def test_smoothed_loss_predicts_the_next_token() -> None:
    logits, input_ids = torch.randn(2, 5, 7), torch.randint(7, (2, 5))
    logs = logits.log_softmax(-1)[:, :-1]
    target = logs.gather(-1, input_ids[:, 1:, None]).mean()
    expected = -(0.98 * target + 0.02 * logs.mean())
    assert demo_training.smoothed_loss(logits, input_ids).item() == pytest.approx(expected.item(), rel=1e-5)


def test_weight_decay_is_on_matrices_only(model: LlamaForCausalLM) -> None:
    decayed, kept = demo_training.adamw(model).param_groups
    assert (decayed["weight_decay"], kept["weight_decay"]) == (0.1, 0.0)
    assert {p.dim() for p in decayed["params"]} == {2} and {p.dim() for p in kept["params"]} == {1}


def test_train_step_follows_the_gradient_at_the_given_rate(model: LlamaForCausalLM) -> None:
    optimizer, rows = demo_training.adamw(model), torch.randint(320, (4, 16))
    before = [parameter.detach().clone() for parameter in model.parameters()]
    first = demo_training.train_step(model, optimizer, rows, rate=0.0, half=False)
    assert all(torch.equal(old, new) for old, new in zip(before, model.parameters(), strict=True))
    losses = [demo_training.train_step(model, optimizer, rows, rate=3e-3, half=False) for _ in range(10)]
    assert losses[0] == pytest.approx(first, rel=1e-6) and losses[-1] < first - 0.1
