from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from configs.errors import UserError
from models.export.flat_layer import (
    FlatLayer,
    check_flat,
    equalized,
    flat_layer,
    with_copied_shared,
    with_shared_width,
)
from models.remote_code.execution_fedgraft import gated_ffn
from tests.support.tiny_graphs import graph_of, shared_graph_of

SILU = torch.nn.functional.silu


def run(layer: FlatLayer, x_TD: torch.Tensor) -> torch.Tensor:
    """Output of a plain mixture, a token at a time."""
    rows = []
    for x_D in x_TD:
        chosen = (layer.router_ED @ x_D).topk(layer.top_k).indices.tolist()
        parts = [
            gated_ffn(SILU, x_D[None], layer.gate_up_EHD[each], layer.down_EDH[each])[0] for each in chosen
        ]
        parts.append(gated_ffn(SILU, x_D[None], layer.shared_gate_up_SD, layer.shared_down_DS)[0])
        rows.append(torch.stack(parts).sum(0))
    return torch.stack(rows)


def tokens(count: int = 20) -> torch.Tensor:
    """Random FFN inputs."""
    return torch.randn(count, 32, generator=torch.Generator().manual_seed(0))


@torch.no_grad()
@pytest.mark.parametrize(
    "graph", [graph_of(visits=2), shared_graph_of(default_rank=0)], ids=["plain", "shared"]
)
def test_the_sum_of_shared_and_routed_experts_is_the_output_of_the_layer(graph):
    for layer in graph.expert_layers():
        flat = flat_layer(layer)
        assert flat.num_experts == layer.num_experts - layer.num_shared
        assert flat.top_k == layer.num_visits - layer.num_shared
        torch.testing.assert_close(run(flat, tokens()), layer(tokens()), rtol=1e-4, atol=1e-4)
        torch.testing.assert_close(
            run(with_copied_shared(flat), tokens()), layer(tokens()), rtol=1e-4, atol=1e-4
        )
        wide = with_shared_width(flat, 40)
        assert wide.shared_down_DS.shape == (32, 40) and wide.shared_gate_up_SD.shape == (80, 32)
        torch.testing.assert_close(run(wide, tokens()), layer(tokens()), rtol=1e-4, atol=1e-4)


def test_attached_experts_are_left_out():
    layer = graph_of(visits=2).expert_layers()[0]
    layer.attached = [1]
    flat = flat_layer(layer)
    assert torch.equal(flat.router_ED, layer.router.weight[[0, 2, 3]])
    assert torch.equal(flat.gate_up_EHD, layer.gate_up_proj[[0, 2, 3]])
    assert torch.equal(flat.down_EDH, layer.down_proj[[0, 2, 3]])


def test_one_number_of_experts_and_visits_is_required():
    flat = flat_layer(graph_of(visits=2).expert_layers()[0])
    check_flat([flat, flat])
    fewer = replace(flat, router_ED=flat.router_ED[:3])
    with pytest.raises(UserError, match="got 4, 3 experts and 2, 2 visits; set `equalise`"):
        check_flat([flat, fewer])
    with pytest.raises(UserError, match="4, 4 experts and 2, 1 visits"):
        check_flat([flat, replace(flat, top_k=1)])
    with pytest.raises(UserError, match="got none in layer 1; raise the experts per token"):
        check_flat([flat, replace(flat, top_k=0)])


def test_padding_reaches_the_largest_layer():
    flat = flat_layer(graph_of(visits=3).expert_layers()[0])
    fewer = replace(flat, router_ED=flat.router_ED[:2], top_k=2)
    away = [torch.zeros(32), torch.ones(32)]
    padded = equalized([flat, fewer], away)
    assert [layer.padding for layer in padded] == [0, 2] and torch.equal(padded[1].away_D, away[1])
    with pytest.raises(UserError, match="expected 3 visits.* got 1 of 2 in layer 1"):
        equalized([flat, replace(fewer, top_k=1)], away)
