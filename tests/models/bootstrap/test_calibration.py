from __future__ import annotations

import copy

import pytest
import torch
import torch.nn.functional as F

from models.bootstrap import calibration
from models.bootstrap.calibration import (
    Calibration,
    contributions,
    hidden_activations,
    neuron_statistics,
    sample_text,
    visit_ffn_inputs,
)
from models.bootstrap.fisher import output_metrics
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import ffn_inputs, random_ids


@pytest.fixture(scope="module")
def dense():
    return tiny_llama()


def test_text_is_sampled_from_the_seed_alone(dense):
    torch.manual_seed(5)
    state = torch.random.get_rng_state()
    one = sample_text(dense, blocks=3, block_size=20, seed=1)
    assert torch.equal(torch.random.get_rng_state(), state)
    torch.manual_seed(6)
    assert torch.equal(sample_text(dense, blocks=3, block_size=20, seed=1), one)
    assert not torch.equal(sample_text(dense, blocks=3, block_size=20, seed=2), one)
    assert one.shape == (3, 20) and (one[:, 0] == dense.config.bos_token_id).all()
    assert len({tuple(row.tolist()) for row in one}) == 3


def test_blocks_are_full_whatever_the_models_own_generation_settings(dense):
    eager = copy.deepcopy(dense)
    eager.generation_config.eos_token_id = list(range(1, 60))
    eager.generation_config.top_k = 1
    eager.generation_config.repetition_penalty = 5.0
    ids = sample_text(eager, blocks=4, block_size=30, seed=1)
    assert ids.shape == (4, 30)
    assert len({tuple(row.tolist()) for row in ids}) == 4  # top_k = 1 would make all blocks one


def test_a_model_without_bos_starts_from_token_zero(dense):
    without = copy.deepcopy(dense)
    without.config.bos_token_id = without.generation_config.bos_token_id = None
    ids = sample_text(without, blocks=2, block_size=5, seed=0)
    assert ids.shape == (2, 5) and (ids[:, 0] == 0).all()


def test_sampled_tokens_follow_the_models_own_distribution(dense):
    ids = sample_text(dense, blocks=3000, block_size=2, seed=3)[:, 1]
    with torch.no_grad():
        expected = dense(input_ids=torch.tensor([[dense.config.bos_token_id]])).logits[0, -1].softmax(-1)
    expected[dense.config.eos_token_id] = 0  # a block never ends early
    expected /= expected.sum()
    counted = torch.bincount(ids, minlength=64) / len(ids)
    assert (counted - expected).abs().max() < 5 * (expected / len(ids)).sqrt().max()


@torch.no_grad()
def test_visitors_see_what_each_ffn_receives_and_hooks_are_gone_afterwards(dense):
    ids, seen = random_ids(dense, 5, 7), {0: [], 1: []}
    visit_ffn_inputs(dense, ids, lambda layer, x_TD: seen[layer].append(x_TD), batch_size=2)
    for layer, parts in seen.items():
        states = []
        module = dense.model.layers[layer].post_attention_layernorm
        handle = module.register_forward_hook(lambda _, __, output, states=states: states.append(output))
        dense(input_ids=ids)
        handle.remove()
        torch.testing.assert_close(torch.cat(parts), states[0].flatten(0, 1))
    count = len(seen[0])

    def broken(layer, x_TD):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"):
        visit_ffn_inputs(dense, ids, broken)
    dense(input_ids=ids)
    assert len(seen[0]) == count == 3


@torch.no_grad()
def test_activations_and_contributions_are_those_of_the_ffn(dense):
    mlp, x = dense.model.layers[0].mlp, torch.randn(6, 32)
    hidden = hidden_activations(mlp, x)
    torch.testing.assert_close(hidden @ mlp.down_proj.weight.T, mlp(x))
    each = contributions(mlp, x)
    for neuron in (0, 17):
        alone = torch.zeros_like(hidden)
        alone[:, neuron] = hidden[:, neuron]
        torch.testing.assert_close(each[:, neuron], (alone @ mlp.down_proj.weight.T).norm(dim=-1))


@torch.no_grad()
def test_statistics_are_those_of_a_direct_computation(dense):
    ids = random_ids(dense, 40, 8)
    statistics = neuron_statistics(dense, ids, profile_tokens=150)
    for layer in range(2):
        x, mlp = ffn_inputs(dense, ids, layer), dense.model.layers[layer].mlp
        hidden = F.silu(x @ mlp.gate_proj.weight.T) * (x @ mlp.up_proj.weight.T)
        norms = mlp.down_proj.weight.square().sum(0).sqrt()
        torch.testing.assert_close(statistics.mean_activation[layer], hidden.abs().mean(0))
        torch.testing.assert_close(statistics.mean_contribution[layer], hidden.abs().mean(0) * norms)
        torch.testing.assert_close(statistics.profiles[layer], hidden[:150].T)


def test_fewer_tokens_than_profile_places_are_all_kept(dense):
    assert neuron_statistics(dense, random_ids(dense, 2, 5)).profiles[0].shape == (64, 10)


def test_profiles_keep_no_activations_of_other_tokens_in_memory(dense, monkeypatch):
    kept, cat = [], torch.cat

    def spy(parts, *rest, **named):
        if parts and parts[0].ndim == 2 and parts[0].shape[1] == 64:
            kept.extend((part.untyped_storage().nbytes(), part.numel() * 4) for part in parts)
        return cat(parts, *rest, **named)

    monkeypatch.setattr(torch, "cat", spy)
    neuron_statistics(dense, random_ids(dense, 20, 8), profile_tokens=5)
    assert len(kept) == 4 and all(stored == used for stored, used in kept)


def test_a_calibration_measures_each_statistic_once(dense, monkeypatch):
    ids, passes = random_ids(dense, 4, 8), []
    expected = neuron_statistics(dense, ids), output_metrics(dense, ids)
    for name in ("neuron_statistics", "output_metrics"):
        original = getattr(calibration, name)
        monkeypatch.setattr(
            calibration,
            name,
            lambda *args, original=original, name=name, **options: passes.append(name)
            or original(*args, **options),
        )
    measured = Calibration(dense, ids)
    assert passes == []
    for _ in range(2):
        torch.testing.assert_close(measured.statistics.mean_contribution, expected[0].mean_contribution)
        torch.testing.assert_close(measured.metrics, expected[1])
    assert passes == ["neuron_statistics", "output_metrics"]


def test_text_is_sampled_in_batches(dense):
    ids = sample_text(dense, blocks=5, block_size=6, seed=3, batch_size=2)
    assert ids.shape == (5, 6) and torch.equal(ids[:2], sample_text(dense, blocks=2, block_size=6, seed=3))
