from __future__ import annotations

import copy
import weakref

import pytest
import torch
from bitsandbytes.nn import Linear4bit, Params4bit
from torch import nn

from models.graph.attention_vectors import read_attention, write_attention
from models.graph.expert_modules import ExpertFFN, ExpertModules, materialize_modules
from models.graph.runtime_settings import set_residents
from models.graph.unit_vectors import read_unit
from models.remote_code.configuration_fedgraft import FedGraftConfig
from models.remote_code.execution_fedgraft import gated_ffn
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, logit_difference, random_ids, with_random_gains

IDS = random_ids(tiny_llama())


def random_graph(num_experts: list[int], **options) -> FedGraftForCausalLM:
    """A graph of random weights, gains and edges, with experts of 16 neurons."""
    torch.manual_seed(0)
    config = FedGraftConfig(
        **{**tiny_llama().config.to_dict(), "model_type": "fedgraft", "architectures": None},
        num_experts=num_experts,
        expert_size=16,
        experts_per_token=3,
        **options,
    )
    return with_random_gains(FedGraftForCausalLM(config).eval())


def in_modules(graph, residents=None, *, kind: str = "plain", dtype=torch.float32) -> FedGraftForCausalLM:
    """A copy of the graph with its experts as modules."""
    model = copy.deepcopy(graph)
    materialize_modules(model, residents or [None] * len(model.expert_layers()), kind=kind, dtype=dtype)
    return model


def dequantized(model, graph) -> FedGraftForCausalLM:
    """A copy of the fused ``graph`` that holds the dequantized weights of ``model``."""
    fused = copy.deepcopy(graph)
    for index, layer in enumerate(model.expert_layers()):
        for expert in layer.storage.held:
            fused.expert_layers()[index].write_expert(expert, *layer.read_expert(expert))
        write_attention(fused, index, read_attention(model, index))
    set_residents(fused, [layer.resident for layer in model.expert_layers()])
    return fused


def linears(model) -> list[nn.Module]:
    return [
        linear
        for layer in model.expert_layers()
        for expert in layer.storage.held
        for linear in (layer.storage.expert(expert).gate_up, layer.storage.expert(expert).down)
    ]


def mask(*experts: int, of: int = 4) -> torch.Tensor:
    return torch.tensor([expert in experts for expert in range(of)])


@pytest.mark.parametrize("graph", [graph_of(visits=2), random_graph([4, 4]), random_graph([3, 5])])
def test_plain_modules_equal_the_fused_graph(graph):
    model = in_modules(graph)
    assert logit_difference(model, graph, IDS) < 1e-5
    assert not any(parameter.requires_grad for linear in linears(model) for parameter in linear.parameters())


@pytest.mark.parametrize("graph", [graph_of(visits=2), random_graph([3, 5])])
def test_four_bit_modules_equal_the_fused_graph_of_the_dequantized_weights(graph):
    model = in_modules(graph, kind="nf4")
    assert logit_difference(model, dequantized(model, graph), IDS) < 1e-4
    assert logit_difference(model, graph, IDS) > 1e-2


def test_every_expert_and_projection_is_four_bit_and_nothing_else():
    graph = random_graph([3, 5])
    model = in_modules(graph, kind="nf4")
    experts = linears(model)
    assert len(experts) == 2 * (3 + 5)
    for linear in experts:
        assert isinstance(linear, Linear4bit) and isinstance(linear.weight, Params4bit)
        assert linear.weight.quant_type == "nf4" and linear.weight.dtype == torch.uint8
    found = {name for name, module in model.named_modules() if isinstance(module, Linear4bit)}
    assert len(found) == len(experts) + 2 * 4 and sum("self_attn" in name for name in found) == 8
    rest = {name: value for name, value in model.named_parameters() if value.dtype != torch.uint8}
    stays = dict(graph.named_parameters())
    for name, value in rest.items():
        assert torch.equal(value, stays[name]) or value.numel() == 0


def test_four_bits_take_about_a_quarter_of_bf16():
    graph = graph_of(tiny_llama(hidden_size=128, intermediate_size=512, num_hidden_layers=1), visits=2)
    sixteen = in_modules(graph, dtype=torch.bfloat16)
    four = in_modules(graph, kind="nf4")
    full = sum(linear.weight.nbytes for linear in linears(sixteen))
    packed = sum(
        linear.weight.nbytes + linear.weight.absmax.nbytes + linear.weight.state2.absmax.nbytes
        for linear in linears(four)
    )
    assert 0.25 < packed / full < 0.27
    assert sum(layer.gate_up_proj.numel() for layer in four.expert_layers()) == 0


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_only_residents_are_held(kind):
    graph = random_graph([4, 4])
    residents = [mask(1, 3), mask(2)]
    model = in_modules(graph, residents, kind=kind)
    assert [layer.storage.held for layer in model.expert_layers()] == [[1, 3], [2]]
    assert [layer.resident.tolist() for layer in model.expert_layers()] == [r.tolist() for r in residents]
    reference = dequantized(model, graph)
    assert logit_difference(model, reference, IDS) < 1e-4
    with pytest.raises(ValueError, match=r"\[1, 3\], got 0"):
        model.expert_layers()[0].read_expert(0)


def test_a_layer_of_one_expert():
    graph = graph_of(num_experts=1, visits=1)
    assert logit_difference(in_modules(graph), graph, IDS) < 1e-5


def test_experts_are_read_one_at_a_time_from_where_they_are():
    graph, alive = graph_of(), []

    class Elsewhere:
        def __init__(self, layer):
            self.weights = {e: tuple(w.detach() for w in layer.read_expert(e)) for e in range(4)}

        def read(self, expert):
            assert not any(ref() is not None for ref in alive)
            weights = tuple(weight.clone() for weight in self.weights[expert])
            alive[:] = [weakref.ref(weight) for weight in weights]
            return weights

    model = copy.deepcopy(graph)
    for layer in model.expert_layers():
        layer.storage = Elsewhere(layer)
    materialize_modules(model, [None, None], kind="plain", dtype=torch.float32)
    assert logit_difference(model, graph, IDS) < 1e-5


def test_the_fused_tensors_are_let_go():
    model = graph_of()
    fused = [weakref.ref(layer.gate_up_proj) for layer in model.expert_layers()]
    materialize_modules(model, [None, None], kind="plain", dtype=torch.float32)
    assert [ref() for ref in fused] == [None, None]
    held = [linear.weight.untyped_storage().nbytes() for linear in linears(model)]
    assert held == [linear.weight.nbytes for linear in linears(model)]


def test_reading_gives_the_base_and_writing_is_refused():
    graph = graph_of()
    model = in_modules(graph)
    assert torch.equal(read_unit(model, (1, 2)), read_unit(graph, (1, 2)))
    layer = model.expert_layers()[0]
    with pytest.raises(ValueError, match="expert 1 is a fixed base"):
        layer.write_expert(1, *layer.read_expert(1))


@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_products_are_in_the_dtype_asked_for(kind, dtype):
    graph = graph_of()
    model = in_modules(graph, kind=kind, dtype=dtype)
    storage = model.expert_layers()[0].storage
    rows = torch.randn(3, 32, generator=torch.Generator().manual_seed(0))
    gate_up, down = storage.read(1)
    assert gate_up.dtype == dtype
    expected = gated_ffn(storage.expert(1).act_fn, rows.to(dtype), gate_up, down)
    assert storage.run(1, rows).dtype == rows.dtype
    torch.testing.assert_close(storage.run(1, rows), expected.float(), atol=1e-5, rtol=1e-3)


def test_a_dtype_is_chosen_for_the_device(monkeypatch):
    monkeypatch.setattr("models.graph.expert_modules.compute_dtype", lambda device: torch.bfloat16)
    assert linears(in_modules(graph_of(), dtype=None))[0].weight.dtype == torch.bfloat16


def test_a_kind_that_is_not_known():
    model = graph_of()
    with pytest.raises(ValueError, match="plain or nf4, got 'int8'"):
        materialize_modules(model, [None, None], kind="int8")
    assert model.expert_layers()[0].storage is None


def test_an_expert_is_the_gated_ffn():
    gate_up, down = nn.Linear(4, 6, bias=False), nn.Linear(3, 4, bias=False)
    storage = ExpertModules({7: ExpertFFN(gate_up, down, nn.SiLU())}, torch.float32)
    rows = torch.randn(2, 4, generator=torch.Generator().manual_seed(0))
    expected = gated_ffn(nn.SiLU(), rows, gate_up.weight, down.weight)
    torch.testing.assert_close(storage.run(7, rows), expected)
    assert storage.held == [7] and len(list(storage.parameters())) == 2
