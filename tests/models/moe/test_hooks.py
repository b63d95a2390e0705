"""Inputs and outputs of experts, against plain loops over transformers' own routers and experts."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from configs.errors import UserError
from models.graph.runtime_settings import set_visits
from models.moe.hooks import observing_experts
from models.moe.layers import ExpertRows
from models.moe.views import MoELayer, moe_layers
from tests.support.module_moe import with_module_experts
from tests.support.tiny_graphs import graph_of, random_ids, with_random_gains
from tests.support.tiny_moes import FAMILIES, tiny_moe


def observed(model, ids) -> tuple[dict[tuple[int, int], ExpertRows], Tensor]:
    """All rows by layer ordinal and expert, and the logits of the observed pass."""
    rows: dict[tuple[int, int], ExpertRows] = {}

    def on_rows(layer: MoELayer, found: ExpertRows) -> None:
        rows[layer.ordinal, found.expert] = found

    with observing_experts(moe_layers(model), on_rows):
        logits = model(input_ids=ids, use_cache=False).logits
    return rows, logits


def block_calls(model, ids) -> list[tuple[Tensor, Tensor]]:
    """Input and output of every MoE block in a plain pass, flattened to ``[T, D]``."""
    calls, hooks = [], []
    for layer in moe_layers(model):
        hooks.append(
            layer.block.register_forward_hook(
                lambda _, inputs, output: calls.append((inputs[0].flatten(0, -2), output.flatten(0, -2)))
            )
        )
    model(input_ids=ids, use_cache=False)
    for hook in hooks:
        hook.remove()
    return calls


@torch.no_grad()
@pytest.mark.parametrize("family", FAMILIES)
def test_rows_are_what_transformers_routers_and_experts_say(family):
    model = tiny_moe(family)
    ids = random_ids(model, 2, 16)
    rows, logits = observed(model, ids)
    torch.testing.assert_close(logits, model(input_ids=ids).logits, atol=2e-5, rtol=1e-4)
    for layer, (x_TD, _) in zip(moe_layers(model), block_calls(model, ids), strict=True):
        _, gates_TK, experts_TK = layer.router(x_TD)
        for expert in range(layer.num_experts):
            tokens, places = torch.where(experts_TK == expert)
            if not len(tokens):
                assert (layer.ordinal, expert) not in rows
                continue
            found = rows[layer.ordinal, expert]
            assert found.tokens.tolist() == tokens.tolist()
            torch.testing.assert_close(found.gates, gates_TK[tokens, places])
            gate_up, down = layer.experts.gate_up_proj[expert], layer.experts.down_proj[expert]
            gate, up = (x_TD[tokens] @ gate_up.T).chunk(2, -1)
            torch.testing.assert_close(
                found.outputs, (layer.experts.act_fn(gate) * up) @ down.T, atol=1e-5, rtol=1e-4
            )


@torch.no_grad()
@pytest.mark.parametrize("family", ["qwen3_moe", "olmoe"])
def test_modules_give_the_rows_of_the_fused_model(family):
    model = tiny_moe(family)
    ids = random_ids(model, 2, 16)
    expected, _ = observed(model, ids)
    rows, _ = observed(with_module_experts(model), ids)
    assert rows.keys() == expected.keys()
    for key, found in rows.items():
        assert found.tokens.tolist() == expected[key].tokens.tolist()
        torch.testing.assert_close(found.gates, expected[key].gates)
        torch.testing.assert_close(found.outputs, expected[key].outputs, atol=1e-5, rtol=1e-4)


def test_a_router_of_another_kind_than_the_configuration_says_is_refused():
    model = with_module_experts(tiny_moe("qwen3_moe"))
    for decoder in model.model.layers:
        decoder.mlp.top_k = 2
        decoder.mlp.forward = lambda hidden, block=decoder.mlp: sum(
            expert(hidden) for expert in block.experts
        )
    with pytest.raises(UserError, match="not supported"):
        observed(model, random_ids(model, 1, 8))


@torch.no_grad()
@pytest.mark.parametrize("visits", [1, 2, 4])
def test_a_graph_passes_along_its_edges_and_tells_the_same_rows(visits):
    graph = with_random_gains(graph_of(num_experts=4))
    set_visits(graph, visits)
    ids = random_ids(graph, 2, 16)
    expected = graph(input_ids=ids).logits
    rows, logits = observed(graph, ids)
    torch.testing.assert_close(logits, expected, atol=1e-5, rtol=1e-4)
    for layer, (_, out_TD) in zip(moe_layers(graph), block_calls(graph, ids), strict=True):
        total = torch.zeros_like(out_TD)
        for expert in range(4):
            if found := rows.get((layer.ordinal, expert)):
                total.index_add_(0, found.tokens, found.gates[:, None] * found.outputs)
        torch.testing.assert_close(total, out_TD, atol=1e-5, rtol=1e-4)
    assert all(layer.block.storage is None and not layer.block.observers for layer in moe_layers(graph))


@torch.no_grad()
def test_one_token_at_a_time_is_observed_too():
    graph = graph_of(num_experts=4, visits=2)
    rows, _ = observed(graph, random_ids(graph, 1, 1))
    assert sum(len(found.tokens) for found in rows.values()) == 2 * len(moe_layers(graph))


@torch.no_grad()
def test_the_model_is_left_as_it_was_after_an_error():
    model = tiny_moe("mixtral")
    ids = random_ids(model, 1, 8)
    expected = model(input_ids=ids).logits

    def failing(*_):
        raise RuntimeError("stop")

    with pytest.raises(RuntimeError, match="stop"), observing_experts(moe_layers(model), failing):
        model(input_ids=ids)
    assert torch.equal(model(input_ids=ids).logits, expected)
