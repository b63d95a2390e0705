from __future__ import annotations

import pytest
import torch

from models.checkpoints.save import cast_weights
from models.graph.unit_vectors import (
    Span,
    add_to_unit,
    read_unit,
    trained_spans,
    unit_shapes,
    unit_sizes,
    write_unit,
)
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, with_random_gains


@pytest.fixture(params=["fp32", "bf16"])
def model(request):
    graph = with_random_gains(graph_of())
    return graph if request.param == "fp32" else cast_weights(graph, torch.bfloat16)


def state(model) -> dict[str, torch.Tensor]:
    return {name: value.clone() for name, value in model.state_dict().items()}


def changed(before: dict[str, torch.Tensor], model) -> set[str]:
    """Names of the tensors that are no longer equal bit for bit."""
    return {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}


def test_there_is_one_unit_per_layer_and_expert_of_the_documented_size(model):
    hidden, width, experts = 32, 64 // 4, 4
    size = 3 * width * hidden + hidden + 1 + 2 * experts
    assert unit_sizes(model) == {(layer, expert): size for layer in range(2) for expert in range(4)}
    assert all(read_unit(model, unit).numel() == size for unit in unit_sizes(model))


def test_the_vector_is_laid_out_as_documented(model):
    layer = model.expert_layers()[1]
    vector = read_unit(model, (1, 2))
    hidden, width = 32, 16
    gate, up = layer.gate_up_proj[2].detach().float().chunk(2)
    rows = vector[: 3 * width * hidden].view(3 * width, hidden)
    assert torch.equal(rows[:width], gate)
    assert torch.equal(rows[width : 2 * width], up)
    assert torch.equal(rows[2 * width :], layer.down_proj[2].detach().float().T)
    router, gain, incoming, affinity = vector[3 * width * hidden :].split([hidden, 1, 4, 4])
    assert torch.equal(router, layer.router.weight[2])
    assert torch.equal(gain, layer.output_gain[2:3])
    assert torch.equal(incoming, layer.edge_gain[:, 2])
    assert torch.equal(affinity, layer.edge_affinity[:, 2])


def test_what_was_read_is_a_copy_in_fp32(model):
    before = state(model)
    vector = read_unit(model, (0, 1))
    assert vector.dtype == torch.float32 and not vector.requires_grad
    vector.zero_()
    assert not changed(before, model)


def test_writing_back_what_was_read_changes_no_bit(model):
    before = state(model)
    for unit in unit_sizes(model):
        write_unit(model, unit, read_unit(model, unit))
    assert not changed(before, model)


def test_what_is_written_is_read_again(model):
    generator = torch.Generator().manual_seed(0)
    for unit, size in unit_sizes(model).items():
        # Few enough bits for bf16, so that nothing is rounded.
        vector = torch.randint(-100, 100, (size,), generator=generator).float()
        write_unit(model, unit, vector)
        assert torch.equal(read_unit(model, unit), vector)


def test_writing_a_unit_leaves_all_others_alone(model):
    before, others = state(model), {u: read_unit(model, u) for u in unit_sizes(model) if u != (1, 2)}
    write_unit(model, (1, 2), read_unit(model, (1, 2)) + 1)
    assert all(torch.equal(read_unit(model, unit), vector) for unit, vector in others.items())
    names = "gate_up_proj down_proj router.weight output_gain edge_gain edge_affinity".split()
    assert changed(before, model) == {f"model.layers.1.mlp.{name}" for name in names}


def test_the_units_of_a_layer_cover_its_parameters_once(model):
    layer = model.expert_layers()[0]
    total = sum(size for unit, size in unit_sizes(model).items() if unit[0] == 0)
    assert total == sum(parameter.numel() for parameter in layer.parameters())


@pytest.mark.parametrize("difference", [-1, 1])
def test_a_vector_of_another_size_is_refused_and_changes_nothing(model, difference):
    before = state(model)
    with pytest.raises(ValueError, match=r"unit \(0, 0\): expected 1577 entries, got"):
        write_unit(model, (0, 0), torch.zeros(1577 + difference))
    assert not changed(before, model)


def test_a_step_is_added_in_fp32(model):
    start, step = read_unit(model, (0, 3)), torch.full((1577,), 0.125)
    add_to_unit(model, (0, 3), step)
    expected = start + step
    if model.dtype == torch.bfloat16:
        expected[: 3 * 16 * 32] = expected[: 3 * 16 * 32].bfloat16().float()  # routers and gains stay in fp32
    assert torch.equal(read_unit(model, (0, 3)), expected)


def test_sizes_follow_the_number_of_experts():
    model = graph_of(tiny_llama(num_hidden_layers=1), num_experts=8)
    assert unit_sizes(model) == {(0, expert): 3 * 8 * 32 + 32 + 1 + 16 for expert in range(8)}


def test_the_matrix_of_an_expert_stands_at_the_start_of_its_vector():
    model = graph_of()
    shapes, sizes = unit_shapes(model), unit_sizes(model)
    assert shapes.keys() == sizes.keys()
    for unit, (rows, columns) in shapes.items():
        gate_up, down = model.expert_layers()[unit[0]].read_expert(unit[1])
        matrix = read_unit(model, unit)[: rows * columns].view(rows, columns)
        assert torch.equal(matrix, torch.cat([gate_up, down.T]))


def test_trained_spans_are_the_matrices_the_routing_or_both(model):
    matrices = 3 * 16 * 32
    sizes = unit_sizes(model, attention=True)
    for train, (start, stop) in {
        "all": (0, None),
        "experts": (0, matrices),
        "routing": (matrices, None),
    }.items():
        spans = trained_spans(model, train)
        assert spans.keys() == unit_sizes(model).keys()
        assert all(each == Span(start, stop or sizes[unit], sizes[unit]) for unit, each in spans.items())
    attention = trained_spans(model, "experts", attention=True)
    assert attention[1, -1] == Span(0, sizes[1, -1], sizes[1, -1]) and attention.keys() == sizes.keys()
