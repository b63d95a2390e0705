"""One decoder layer at a time, against the whole model at once."""

from __future__ import annotations

import pytest
import torch

from models.moe.layerwise import walk_layers
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, random_ids
from tests.support.tiny_moes import FAMILIES, tiny_moe


@torch.no_grad()
@pytest.mark.parametrize("family", [*FAMILIES, "graph", "dense"])
@pytest.mark.parametrize("padded", [False, True])
def test_layer_by_layer_gives_what_the_model_gives(family, padded):
    own = {"graph": graph_of, "dense": tiny_llama}
    model = own[family]() if family in own else tiny_moe(family)
    masks = [torch.ones(2, 10, dtype=torch.int64) for _ in range(2)]
    if padded:
        masks[1][:, 7:] = 0
    batches = [
        (random_ids(model, 2, 10, seed=seed), {"attention_mask": mask} if padded else {})
        for seed, mask in enumerate(masks)
    ]
    outputs: list[torch.Tensor] = []
    for inputs in walk_layers(model, batches):
        outputs = inputs.run()
    for (ids, further), hidden in zip(batches, outputs, strict=True):
        expected = model.model(input_ids=ids, use_cache=False, **further).last_hidden_state
        torch.testing.assert_close(model.model.norm(hidden), expected, atol=1e-5, rtol=1e-4)


@torch.no_grad()
def test_a_layer_that_is_changed_changes_what_the_next_receives():
    model, other = tiny_llama(), tiny_llama()
    ids = random_ids(model, 1, 8)
    for inputs in walk_layers(model, [(ids, {})]):
        if inputs.index == 0:
            inputs.layer.mlp.down_proj.weight.zero_()
            other.model.layers[0].mlp.down_proj.weight.zero_()
        else:
            expected = next(x for x in _second_inputs(other, ids))
            torch.testing.assert_close(inputs.hidden[0], expected)


def _second_inputs(model, ids):
    return [inputs.hidden[0] for inputs in walk_layers(model, [(ids, {})]) if inputs.index == 1]


def test_batches_are_told():
    model, told = tiny_llama(), []
    for inputs in walk_layers(model, [(random_ids(model, 1, 4), {})] * 3):
        if inputs.index == 0:
            inputs.run(told.append)
    assert told == [0, 1, 2]
