"""Saliency of one pass, against the published formula written out over every token and expert."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import numpy as np
import pytest
import torch

from configs.errors import UserError
from experts.saliency.measures import ARRAYS, load_saliency
from models.moe import saliency_collection
from models.moe.saliency_collection import collect_saliency
from models.moe.views import moe_layers
from tests.conftest import tiny_llama
from tests.support.module_moe import with_module_experts
from tests.support.tiny_graphs import graph_of, random_ids
from tests.support.tiny_moes import FAMILIES, tiny_moe


def batches_of(model, sizes=(2, 1, 3), length=12, padding=0):
    """Batches of random tokens; the last ``padding`` tokens of each block do not count."""
    for seed, size in enumerate(sizes):
        token_mask = torch.ones(size, length, dtype=torch.bool)
        token_mask[:, length - padding :] = False
        yield random_ids(model, size, length, seed=seed), token_mask


def block_inputs(model, input_ids) -> list[torch.Tensor]:
    """What every MoE block receives, ``[T, D]``."""
    inputs: list[torch.Tensor] = []
    hooks = [
        layer.block.register_forward_pre_hook(lambda _, args: inputs.append(args[0].flatten(0, -2)))
        for layer in moe_layers(model)
    ]
    model(input_ids=input_ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return inputs


@torch.no_grad()
def plain_saliency(model, batches) -> dict[str, np.ndarray]:
    """REAP's sums, token by token: every expert runs on every token, and gates are those of transformers' router."""
    layers = moe_layers(model)
    sums = {name: np.zeros((len(layers), layers[0].num_experts)) for name in ARRAYS}
    for input_ids, token_mask in batches:
        for layer, x_TD in zip(layers, block_inputs(model, input_ids), strict=True):
            router: Any = layer.router
            _, gates, experts = router(x_TD)
            for token in token_mask.flatten().nonzero().flatten().tolist():
                for gate, expert in zip(gates[token].tolist(), experts[token].tolist(), strict=True):
                    gate_up, down = layer.experts.gate_up_proj[expert], layer.experts.down_proj[expert]
                    g, u = (gate_up @ x_TD[token]).chunk(2)
                    norm = float((down @ (layer.experts.act_fn(g) * u)).norm())
                    for name, value in zip(ARRAYS, (gate * norm, 1, norm, 1, gate), strict=True):
                        sums[name][layer.ordinal, expert] += value
    return sums


@pytest.mark.parametrize("family", FAMILIES)
def test_sums_are_those_of_the_formula_and_padding_is_not_counted(family):
    model = tiny_moe(family)
    expected = plain_saliency(model, batches_of(model, (2, 1), padding=3))
    found = collect_saliency(model, batches_of(model, (2, 1), padding=3))
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(found, name), expected[name], rtol=1e-4, atol=1e-5)
    np.testing.assert_allclose(
        found.scores("reap"),
        expected["reap_sum"] / np.maximum(expected["reap_count"], 1),
        rtol=1e-4,
        atol=1e-6,
    )
    assert found.decoder_layers == [layer.decoder for layer in moe_layers(model)]
    assert found.provenance == {"tokens": 3 * 9}
    assert found.freq.sum() == 2 * 2 * 3 * 9  # layers, experts per token, blocks, tokens of a block


def test_experts_as_modules_give_the_same_sums():
    model = tiny_moe("olmoe")
    expected = collect_saliency(model, batches_of(model))
    found = collect_saliency(with_module_experts(model), batches_of(model))
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-5, atol=1e-6)


def test_a_graph_counts_its_visits():
    graph = graph_of(num_experts=4, visits=2)
    found = collect_saliency(graph, batches_of(graph))
    assert found.freq.sum(axis=1).tolist() == [2 * 6 * 12] * 2
    # Output gains start at zero, so that every gate is one.
    np.testing.assert_array_equal(found.weighted_freq_sum, found.freq)
    np.testing.assert_allclose(found.reap_sum, found.ean_sum)


def test_an_expert_that_no_token_visits_has_zero_sums():
    model = tiny_moe("mixtral")
    for layer in moe_layers(model):
        layer.router_weight.data[3] = 0
        layer.router_weight.data[:3] = layer.router_weight.data[:1]
        layer.router_weight.data[3] -= 10 * layer.router_weight.data[0]
    found = collect_saliency(model, batches_of(model))
    for layer in range(2):
        assert (found.freq[layer] == 0).any() == (found.scores("reap")[layer] == 0).any()


class Interrupted(Exception):
    """The process ends here."""


def test_an_interrupted_collection_goes_on_where_it_was(tmp_path, monkeypatch):
    monkeypatch.setattr(saliency_collection, "SAVE_SECONDS", -1)
    model, partial = tiny_moe("qwen3_moe"), tmp_path / "s.npz.partial"
    expected = collect_saliency(model, batches_of(model), provenance={"model": "m"})

    def stop(done: int) -> None:
        if done == 2:
            raise Interrupted

    def run(**options):
        return collect_saliency(
            model, batches_of(model), provenance={"model": "m"}, partial=partial, **options
        )

    with pytest.raises(Interrupted):
        run(on_batch=stop)
    assert load_saliency(partial).provenance == {"model": "m", "tokens": 2 * 12, "batches_done": 1}
    seen: list[int] = []
    found = run(on_batch=seen.append)
    assert seen == [2, 3] and partial.exists()
    assert found.provenance == expected.provenance == {"model": "m", "tokens": 6 * 12}
    for name in ARRAYS:
        np.testing.assert_allclose(getattr(found, name), getattr(expected, name), rtol=1e-12)


def test_a_partial_file_of_another_collection_is_refused(tmp_path):
    model, partial = tiny_moe("mixtral"), tmp_path / "s.npz.partial"
    other = collect_saliency(model, batches_of(model))
    saliency_collection.save_saliency(
        replace(other, provenance={"model": "b", "tokens": 1, "batches_done": 1}), partial
    )
    with pytest.raises(UserError, match="delete it to start again"):
        collect_saliency(model, batches_of(model), provenance={"model": "a"}, partial=partial)


def test_no_text_and_no_experts_are_refused():
    model = tiny_moe("mixtral")
    with pytest.raises(UserError, match="no token"):
        collect_saliency(model, [])
    with pytest.raises(UserError, match="expected a model with experts"):
        collect_saliency(tiny_llama(), batches_of(model))
