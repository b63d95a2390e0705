from __future__ import annotations

import pytest
import torch

from clients.training.starting_point import StartingPoint, resident_units
from models.checkpoints.disk_experts import materialize, open_mapped
from models.graph.unit_vectors import read_unit, write_unit
from tests.support.tiny_federation import all_equal
from tests.support.tiny_graphs import graph_of

HELD = [torch.tensor([False, True, False, True]), torch.tensor([True, False, False, False])]
UNITS = [(0, 1), (0, 3), (1, 0)]


@pytest.fixture
def model(tiny_graph_dir):
    return open_mapped(str(tiny_graph_dir))


def test_what_moved_is_given_for_each_resident(model):
    start = StartingPoint(model)
    materialize(model, HELD)
    expected = {}
    for scale, unit in enumerate(UNITS, start=1):
        before = read_unit(model, unit)
        write_unit(model, unit, before + scale)
        expected[unit] = read_unit(model, unit) - before
    assert resident_units(model) == UNITS
    changes = {unit: start.change(model, unit) for unit in UNITS}
    assert all(torch.equal(changes[unit], expected[unit]) for unit in UNITS)
    assert torch.allclose(changes[0, 3], torch.full_like(changes[0, 3], 2.0), atol=1e-5)


def test_what_has_not_moved_has_changed_by_nothing(model):
    start = StartingPoint(model)
    materialize(model, [None, None])
    assert len(resident_units(model)) == 8
    assert not any(start.change(model, unit).any() for unit in resident_units(model))


def test_the_routing_of_others_is_put_back(model, tiny_graph_dir):
    start = StartingPoint(model)
    materialize(model, HELD)
    with torch.no_grad():
        for layer in model.expert_layers():
            for values in (layer.router.weight, layer.output_gain, layer.edge_gain, layer.edge_affinity):
                values.add_(1.0)
    start.restore_others(model)
    untouched = open_mapped(str(tiny_graph_dir))
    for layer, base, held in zip(model.expert_layers(), untouched.expert_layers(), HELD, strict=True):
        for name in ("router", "output_gain"):
            values, others = (each.routing_parameters()[name] for each in (layer, base))
            same = torch.isclose(values, others).reshape(4, -1).all(-1)
            assert torch.equal(same, ~held), name
        for name in ("edge_gain", "edge_affinity"):
            same = torch.isclose(getattr(layer, name), getattr(base, name)).all(0)
            assert torch.equal(same, ~held), name


def test_units_of_a_model_without_residency_are_all():
    assert resident_units(graph_of()) == [(layer, expert) for layer in (0, 1) for expert in range(4)]
    assert all_equal(graph_of(), graph_of())
