from __future__ import annotations

import copy

import pytest
import torch

from models.graph.attention_vectors import attention_count, read_attention, write_attention
from models.graph.lora import (
    attach_attention_lora,
    attach_lora,
    attention_changes,
    lora_change,
    merge_attention_lora,
)
from models.graph.runtime_settings import residents
from models.graph.unit_vectors import read_routing, weight_count, write_routing
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from tests.conftest import tiny_llama
from tests.models.graph.test_expert_modules import in_modules, linears, mask, random_graph
from tests.support.tiny_graphs import graph_of, logit_difference, random_ids

IDS = random_ids(tiny_llama())
EXPERTS_OF = {"graph": lambda: graph_of(visits=4), "random": lambda: random_graph([3, 5])}


def adapted(kind: str, *, graph=None, held=None, dtype=torch.float32, **options) -> FedGraftForCausalLM:
    """A graph under LoRA of rank 2."""
    model = in_modules(graph or graph_of(visits=4), held, kind=kind, dtype=dtype)
    attach_lora(model, **{"rank": 2, "alpha": 6.0, "attention": True, **options})
    return model


def train(model, steps: int = 2, *, autocast: bool = False, rate: float = 0.05) -> list[float]:
    """A few steps of descent; the gradients of the last are left."""
    parameters = [parameter for parameter in model.parameters() if parameter.requires_grad]
    losses = []
    model.train()
    for step in range(steps):
        with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
            loss = model(input_ids=IDS, labels=IDS, use_cache=False).loss
        loss.backward()
        losses.append(float(loss.detach()))
        with torch.no_grad():
            for parameter in parameters:
                if parameter.grad is not None:
                    parameter -= rate * parameter.grad
        if step < steps - 1:
            model.zero_grad()
    model.eval()
    return losses


def changes_of(model) -> list[tuple[tuple[int, int], torch.Tensor]]:
    """Every resident unit and its change."""
    units = [(index, e) for index, layer in enumerate(model.expert_layers()) for e in layer.storage.held]
    return [(unit, lora_change(model, unit)) for unit in units]


def factors(model) -> dict[str, torch.nn.Parameter]:
    return {name: value for name, value in model.named_parameters() if "lora_" in name}


def without_gradient(model) -> list[str]:
    return [name for name, value in factors(model).items() if value.grad is None or not value.grad.any()]


@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize("make", EXPERTS_OF.values(), ids=EXPERTS_OF)
def test_every_factor_has_a_gradient(kind, make):
    model = adapted(kind, graph=make())
    experts = sum(layer.num_experts for layer in model.expert_layers())
    assert len(factors(model)) == 2 * (2 * experts + 2 * 4)
    losses = train(model, 3)
    assert without_gradient(model) == []
    assert losses[2] < losses[0]


def test_routing_trains_and_the_base_is_frozen():
    names = {name for name, value in adapted("nf4").named_parameters() if value.requires_grad}
    routing = {
        f"model.layers.{layer}.mlp.{name}"
        for layer in range(2)
        for name in ("router.weight", "edge_gain", "edge_affinity", "output_gain")
    }
    assert names == routing | set(factors(adapted("nf4")))
    fixed = adapted("nf4", routing=False)
    assert {name for name, value in fixed.named_parameters() if value.requires_grad} == set(factors(fixed))


def test_what_trains_is_returned():
    model = in_modules(graph_of(), kind="nf4")
    trained = attach_lora(model, rank=1, alpha=1.0)
    assert trained == [parameter for parameter in model.parameters() if parameter.requires_grad]
    assert len(trained) == 2 * (2 * 2 * 4 + 4)


def test_attention_is_optional():
    model = adapted("nf4", attention=False)
    train(model)
    assert not any("self_attn" in name for name in factors(model))
    assert list(attention_changes(model)) == []
    assert without_gradient(model) == []


def test_factors_start_without_effect():
    graph = graph_of()
    model = adapted("plain", graph=graph)
    assert logit_difference(model, graph, IDS) < 1e-5
    assert not any(change.any() for _, change in [*changes_of(model), *attention_changes(model)])


def test_the_base_does_not_move_and_the_classes_stay():
    graph = graph_of()
    model = adapted("plain", graph=graph)
    train(model)
    assert type(model) is FedGraftForCausalLM and len(model.expert_layers()) == 2
    for index, layer in enumerate(graph.expert_layers()):
        for expert in range(4):
            for one, other in zip(
                layer.read_expert(expert), model.expert_layers()[index].read_expert(expert), strict=True
            ):
                assert torch.equal(one, other)
        assert torch.equal(read_attention(model, index), read_attention(graph, index))
    assert model.generate(input_ids=IDS[:1, :4], max_new_tokens=2, do_sample=False).shape == (1, 6)


@pytest.mark.parametrize("make", EXPERTS_OF.values(), ids=EXPERTS_OF)
def test_adding_the_changes_to_the_fused_graph_gives_the_adapted_model(make):
    graph = make()
    model = adapted("plain", graph=graph)
    train(model, 3)
    fused = copy.deepcopy(graph)
    for (index, expert), change in changes_of(model):
        layer = fused.expert_layers()[index]
        assert change.shape == (weight_count(layer),) and change.dtype == torch.float32
        gate, up, down = change.view(3, layer.expert_size, layer.hidden_size)
        gate_up, old_down = layer.read_expert(expert)
        layer.write_expert(expert, gate_up.detach() + torch.cat([gate, up]), old_down.detach() + down.T)
        write_routing(layer, expert, read_routing(model.expert_layers()[index], expert))
    for index, change in attention_changes(model):
        assert change.shape == (attention_count(model, index),)
        write_attention(fused, index, read_attention(fused, index) + change)
    assert logit_difference(model, fused, IDS) < 1e-4
    assert logit_difference(model, graph, IDS) > 1e-3


def test_changes_are_what_a_merge_adds():
    model = adapted("plain")
    train(model)
    changes = dict(changes_of(model))
    for (index, expert), change in changes.items():
        module = model.expert_layers()[index].storage.expert(expert)
        before = [linear.base_layer.weight.clone() for linear in (module.gate_up, module.down)]
        for linear in (module.gate_up, module.down):
            linear.merge()
        gate_up, down = (
            linear.base_layer.weight - old
            for linear, old in zip((module.gate_up, module.down), before, strict=True)
        )
        torch.testing.assert_close(
            change, torch.cat([gate_up.flatten(), down.T.flatten()]), atol=1e-6, rtol=0
        )


def test_a_change_is_alpha_over_rank_times_the_product_of_the_factors():
    model = adapted("nf4", rank=2, alpha=6.0)
    train(model)
    module = model.expert_layers()[1].storage.expert(3)
    gate_up, down = (
        3.0 * linear.lora_B["default"].weight @ linear.lora_A["default"].weight
        for linear in (module.gate_up, module.down)
    )
    expected = torch.cat([gate_up.flatten(), down.T.flatten()])
    torch.testing.assert_close(dict(changes_of(model))[1, 3], expected.detach())
    assert torch.linalg.matrix_rank(gate_up) == 2


def test_only_residents_carry_factors():
    held = [mask(1), mask(0, 2)]
    model = adapted("nf4", held=held)
    train(model)
    assert [unit for unit, _ in changes_of(model)] == [(0, 1), (1, 0), (1, 2)]
    assert [each.tolist() for each in residents(model)] == [each.tolist() for each in held]
    assert without_gradient(model) == []


def test_evaluation_between_steps_changes_nothing():
    straight, evaluated = adapted("nf4"), adapted("nf4")
    expected = train(straight, 1) + train(straight, 1)
    found = train(evaluated, 1)
    with torch.no_grad():
        evaluated(input_ids=IDS)
    assert found + train(evaluated, 1) == expected
    assert without_gradient(evaluated) == []


@pytest.mark.parametrize("kind", ["plain", "nf4"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_factors_are_fp32_and_train_under_autocast(kind, dtype):
    model = adapted(kind, dtype=dtype)
    assert {value.dtype for value in factors(model).values()} == {torch.float32}
    train(model, 3, autocast=True)
    assert without_gradient(model) == []
    train(model, 1)


@pytest.mark.parametrize("kind", ["plain", "nf4"])
def test_gradient_checkpointing_gives_the_same_gradients(kind):
    plain, saving = adapted(kind), adapted(kind)
    saving.gradient_checkpointing_enable()
    assert train(plain, 3) == pytest.approx(train(saving, 3), abs=1e-6)
    for name, value in factors(plain).items():
        torch.testing.assert_close(value.grad, factors(saving)[name].grad)


def test_the_seed_decides_the_first_values_and_the_global_generator_is_left_alone():
    graph = graph_of(visits=4)
    torch.manual_seed(5)
    expected = torch.rand(3)
    torch.manual_seed(5)
    one, same, other = (adapted("plain", graph=graph, seed=seed) for seed in (1, 1, 2))
    assert torch.equal(torch.rand(3), expected)
    values = [factors(model) for model in (one, same, other)]
    assert all(torch.equal(values[0][name], values[1][name]) for name in values[0])
    assert all(not torch.equal(values[0][name], values[2][name]) for name in values[0] if "lora_A" in name)


def test_fused_experts_are_refused():
    with pytest.raises(ValueError, match="materialize_modules first"):
        attach_lora(graph_of(), rank=1, alpha=1.0)


def test_dequantized_bases_are_seen_through_the_factors():
    model = in_modules(graph_of(), kind="nf4")
    before = [weight.clone() for weight in model.expert_layers()[0].read_expert(2)]
    attention = read_attention(model, 0)
    attach_lora(model, rank=2, alpha=4.0, attention=True)
    train(model)
    for one, other in zip(before, model.expert_layers()[0].read_expert(2), strict=True):
        assert torch.equal(one, other)
    assert torch.equal(read_attention(model, 0), attention)
    assert len(linears(model)) == 16


def test_factors_of_attention_alone_are_merged_into_its_weights():
    model, ids = graph_of(visits=4), IDS
    before = copy.deepcopy(model)
    attach_attention_lora(model, rank=2, alpha=6.0)
    assert len(factors(model)) == 2 * 2 * 4 and logit_difference(model, before, ids) < 1e-6
    with torch.no_grad():
        for name, value in factors(model).items():
            if "lora_B" in name:
                value.normal_()
    adapted = copy.deepcopy(model)
    expected = dict(attention_changes(model))
    merge_attention_lora(model)
    assert factors(model) == {} and logit_difference(model, adapted, ids) < 1e-3
    for layer, change in expected.items():
        torch.testing.assert_close(
            read_attention(model, layer) - read_attention(before, layer), change, atol=1e-5, rtol=0
        )
