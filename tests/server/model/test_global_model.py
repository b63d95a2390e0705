from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from configs.errors import UserError
from experts.graph.edge_edits import Edit
from federated.protocol.copy_hash import copy_hash, unit_digest
from federated.protocol.snapshot import apply_snapshot
from federated.protocol.steps import apply_step
from models.checkpoints.load import load_graph
from models.checkpoints.save import cast_weights, save_graph
from models.graph.graph_state import read_graph
from models.graph.unit_vectors import read_unit, unit_sizes
from server.model.global_model import GlobalModel
from tests.support.tiny_federation import all_equal, random_change, save_tiny_graph
from tests.support.tiny_graphs import graph_of, random_ids, with_random_gains


@pytest.fixture
def graph(tmp_path, tiny_tokenizer):
    return save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=2)


@pytest.fixture
def server(graph):
    return GlobalModel(str(graph))


def free_pair(server: GlobalModel, layer: int = 0, *, edge: bool = False) -> tuple[int, int]:
    """A pair p < q of a layer with, or without, an edge."""
    mask = server.graph.masks[layer]
    return next((p, q) for q in range(4) for p in range(q) if mask[p, q] == edge)


def test_it_starts_as_the_checkpoint_at_version_0(server, graph):
    assert all_equal(server.model, load_graph(str(graph), dtype=torch.float32))
    assert (server.version, server.steps) == (0, [])
    assert server.fingerprint == GlobalModel(str(graph)).fingerprint


@pytest.mark.parametrize("value_bits", [2, 4, 8, 16])
def test_a_copy_that_replays_the_steps_is_equal_bit_for_bit(server, graph, value_bits):
    copy_ = load_graph(str(graph), dtype=torch.float32)
    for version in (1, 2, 3):
        server.advance(
            random_change(server.model, [(0, version), (1, 0)], seed=version), value_bits=value_bits
        )
        if version == 2:
            server.edit([Edit("add-edge", 0, *free_pair(server))])
        assert server.version == version and server.steps[-1].version == version
        apply_step(copy_, server.steps[-1])
        assert all_equal(copy_, server.model)
    assert server.graph.version == 1 and len(server.steps[1].edits) == 1


@pytest.mark.parametrize("value_bits", [2, 4])
def test_what_packing_loses_is_made_up_for_later(server, value_bits):
    start = read_unit(server.model, (0, 0))
    change = random_change(server.model, [(0, 0)])
    errors = []
    for rounds in range(1, 13):
        server.advance(change, value_bits=value_bits)
        moved = read_unit(server.model, (0, 0)) - start
        errors.append(float((moved - rounds * change[0, 0])[:1500].norm() / change[0, 0].norm()))
    # Without the residual the error would add up: twelve times that of the first round.
    assert errors[0] > 0.03 and errors[-1] < 12 / 2 * errors[0]


def test_units_without_a_change_do_not_move(server):
    before = {unit: read_unit(server.model, unit) for unit in unit_sizes(server.model)}
    server.advance(random_change(server.model, [(1, 2)]), value_bits=16)
    moved = [
        unit for unit, vector in before.items() if not torch.equal(vector, read_unit(server.model, unit))
    ]
    assert moved == [(1, 2)]


@pytest.mark.parametrize("nothing", [{}, {(0, 1): None}])
def test_a_step_without_a_change_moves_nothing_and_can_carry_edits(server, graph, nothing):
    size = unit_sizes(server.model)[0, 1]
    before = copy.deepcopy(server.model)
    server.advance({unit: torch.zeros(size) for unit in nothing}, value_bits=4)
    assert server.version == 1 and all_equal(server.model, before)
    server.edit([Edit("add-edge", 0, *free_pair(server))])
    other = load_graph(str(graph), dtype=torch.float32)
    apply_step(other, server.steps[-1])
    assert all_equal(other, server.model) and server.graph.version == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e35])
def test_a_step_that_is_not_finite_never_touches_the_model(server, value):
    before = copy.deepcopy(server.model)
    change = random_change(server.model, [(0, 0), (1, 1)])
    change[1, 1][5] = value
    with pytest.raises(UserError, match="finite step of unit .1, 1.*server-learning-rate"):
        server.advance(change, value_bits=4)
    assert all_equal(server.model, before) and (server.version, server.steps) == (0, [])


def test_a_sparse_downlink_sends_the_largest_entries_and_the_rest_later(server):
    change, start = random_change(server.model, [(0, 0)]), read_unit(server.model, (0, 0))
    dense = unit_sizes(server.model)[0, 0]
    server.advance(change, value_bits=16, density=0.1)
    first = read_unit(server.model, (0, 0)) - start
    assert int((first != 0).sum()) <= -(-dense // 10)
    assert first.abs().max() == pytest.approx(float(change[0, 0].abs().max()), rel=1e-2)
    # The same change again: what was left of the first comes before what is new and small.
    for _ in range(40):
        server.advance({(0, 0): torch.full((dense,), 1e-9)}, value_bits=16, density=0.1)
    left = (read_unit(server.model, (0, 0)) - start - change[0, 0])[:1500]
    assert left.norm() < 0.01 * change[0, 0].norm()


def test_the_residual_of_a_unit_waits_until_clients_ship_it_again(server):
    server.advance(random_change(server.model, [(0, 0)]), value_bits=4, density=0.1)
    waiting = read_unit(server.model, (0, 0))
    server.advance(random_change(server.model, [(1, 1)]), value_bits=4, density=0.1)
    assert torch.equal(read_unit(server.model, (0, 0)), waiting)


def test_trying_edits_leaves_nothing_behind_even_after_an_error(server):
    with_random_gains(server.model)
    before = copy.deepcopy(server.model)
    edits = [Edit("remove-edge", 0, 0, 1), Edit("remove-edge", 1, 2, 3)]
    ids = random_ids(server.model)
    with torch.no_grad():
        usual = server.model(input_ids=ids).logits
        with server.trying(edits):
            assert not server.graph.masks[0][0, 1] and server.graph.version == 1
            assert server.model.expert_layers()[0].edge_gain[0, 1] == 0
            assert not torch.equal(server.model(input_ids=ids).logits, usual)
        assert torch.equal(server.model(input_ids=ids).logits, usual)
    assert all_equal(server.model, before)
    with pytest.raises(RuntimeError, match="stop"), server.trying(edits):
        raise RuntimeError("stop")
    with pytest.raises(UserError), server.trying([*edits, *edits]):
        pass
    assert all_equal(server.model, before)
    assert server.version == 0 and server.steps == []


def test_dense_bytes_are_all_ffn_weights_in_bf16(server):
    layers, hidden, width = 2, 32, 64
    assert server.dense_bytes() == layers * 3 * hidden * width * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checkpoint_written_is_the_model_in_the_dtype_it_came_in(tmp_path, tiny_tokenizer, dtype):
    (tmp_path / "graph").mkdir()
    save_graph(cast_weights(graph_of(), dtype), tiny_tokenizer, tmp_path / "graph")
    server = GlobalModel(str(tmp_path / "graph"))
    assert server.model.dtype == torch.float32
    server.advance(random_change(server.model), value_bits=8)
    server.edit([Edit("add-edge", 0, *free_pair(server))])
    server.save(tmp_path / "out", overwrite=False)
    assert server.model.dtype == torch.float32  # the one that trains is left alone
    loaded = load_graph(str(tmp_path / "out"))
    assert loaded.dtype == dtype
    assert read_graph(loaded).digest() == server.graph.digest()
    for name, value in server.model.state_dict().items():
        written = loaded.state_dict()[name]
        assert torch.equal(written, value.to(written.dtype)), name
    gains = [layer.router.dtype for layer in loaded.expert_layers()]
    assert gains == [torch.float32] * 2
    with pytest.raises(UserError, match="overwrite"):
        server.save(tmp_path / "out", overwrite=False)
    server.save(tmp_path / "out", overwrite=True)


def test_what_is_no_graph_is_refused(tiny_llama_dir, tmp_path):
    for source in (tiny_llama_dir, tmp_path):
        with pytest.raises(UserError):
            GlobalModel(str(source))


def test_the_graph_read_is_a_copy(server):
    server.graph.masks[0][:] = False
    assert np.diagonal(server.graph.masks[0]).all()


def advanced(server: GlobalModel, versions: int, units=((0, 0), (1, 2)), value_bits: int = 4) -> None:
    for _ in range(versions):
        change = random_change(server.model, units, seed=server.version)
        server.advance(change, value_bits=value_bits)


def test_a_snapshot_leads_from_the_checkpoint_to_the_model(server, graph):
    advanced(server, 2)
    server.edit([Edit("add-edge", 0, *free_pair(server))])
    fresh = load_graph(str(graph), dtype=torch.float32)
    assert apply_snapshot(fresh, server.snapshot(), 2) == {(0, 0), (1, 2)}
    assert all_equal(fresh, server.model)
    assert server.snapshot() is server.snapshot()


def test_hash_and_snapshot_follow_every_step_and_edit(server):
    seen = [(server.copy_hash, server.snapshot())]
    advanced(server, 1)
    seen.append((server.copy_hash, server.snapshot()))
    server.edit([Edit("add-edge", 0, *free_pair(server))])
    seen.append((server.copy_hash, server.snapshot()))
    assert len({hash_ for hash_, _ in seen}) == len({snapshot for _, snapshot in seen}) == 3
    moved = {unit: unit_digest(server.model, unit) for unit in ((0, 0), (1, 2))}
    assert server.copy_hash == copy_hash(server.model, moved)


def test_a_client_gets_the_steps_it_misses_or_a_snapshot_where_that_is_smaller(server):
    advanced(server, 3)
    assert server.catch_up(3) == ([], b"")
    assert server.catch_up(1) == (server.steps[1:], b"")
    assert server.catch_up(0) == (server.steps, b"")
    advanced(server, 20)
    steps, snapshot = server.catch_up(0)
    assert steps == [] and snapshot == server.snapshot()
    assert len(snapshot) < sum(step.size() for step in server.steps)
    steps, snapshot = server.catch_up(19)
    assert [step.version for step in steps] == [20, 21, 22, 23] and snapshot == b""


def test_many_small_steps_are_smaller_than_a_snapshot(server):
    advanced(server, 1)
    size = unit_sizes(server.model)[0, 0]
    for index in range(6):
        server.advance({(0, 0): 0.1 * torch.nn.functional.one_hot(torch.tensor(index), size)}, value_bits=8)
    assert len(server.catch_up(1)[0]) == 6


def test_steps_that_nobody_needs_are_dropped_and_a_snapshot_takes_their_place(server):
    advanced(server, 3)
    server.drop_steps(2)
    assert [step.version for step in server.steps] == [3]
    assert server.catch_up(2) == (server.steps, b"")
    for held in (0, 1):
        assert server.catch_up(held) == ([], server.snapshot())


def test_steps_never_take_more_than_the_units_that_moved(server):
    sizes = []
    for _ in range(40):
        advanced(server, 1, value_bits=16)
        server.drop_steps(0)
        sizes.append(sum(step.size() for step in server.steps))
    assert max(sizes) <= 4 * 2 * unit_sizes(server.model)[0, 0]
    assert server.steps[-1].version == 40 and len(server.steps) < 10
