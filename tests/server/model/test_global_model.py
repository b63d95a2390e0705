from __future__ import annotations

import copy

import numpy as np
import pytest
import torch

from configs.errors import UserError
from experts.graph.edits import AddEdge, RemoveEdge
from federated.protocol.copy_hash import copy_hash, unit_digest
from federated.protocol.snapshot import apply_snapshot
from federated.protocol.steps import apply_step
from models.checkpoints.load import load_graph
from models.checkpoints.save import cast_weights, save_checkpoint
from models.graph.graph_state import read_graph
from models.graph.unit_vectors import read_unit, unit_sizes
from server.model.global_model import GlobalModel
from tests.support.tiny_federation import all_equal, random_change, save_tiny_graph
from tests.support.tiny_graphs import graph_of, random_ids, with_random_gains


@pytest.fixture
def graph(tmp_path, tiny_tokenizer):
    return save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=2)


@pytest.fixture
def global_model(graph):
    return GlobalModel(str(graph))


def free_pair(global_model: GlobalModel, layer: int = 0, *, edge: bool = False) -> tuple[int, int]:
    """A pair p < q of a layer with, or without, an edge."""
    mask = global_model.graph.masks[layer]
    return next((p, q) for q in range(4) for p in range(q) if mask[p, q] == edge)


def test_it_starts_as_the_checkpoint_at_version_0(global_model, graph):
    assert all_equal(global_model.model, load_graph(str(graph), dtype=torch.float32))
    assert (global_model.version, global_model.steps) == (0, [])
    assert global_model.fingerprint == GlobalModel(str(graph)).fingerprint


@pytest.mark.parametrize("value_bits", [2, 4, 8, 16])
def test_a_copy_that_replays_the_steps_is_equal_bit_for_bit(global_model, graph, value_bits):
    copy_ = load_graph(str(graph), dtype=torch.float32)
    for version in (1, 2, 3):
        global_model.advance(
            random_change(global_model.model, [(0, version), (1, 0)], seed=version), value_bits=value_bits
        )
        if version == 2:
            global_model.edit([AddEdge(0, *free_pair(global_model))])
        assert global_model.version == version and global_model.steps[-1].version == version
        apply_step(copy_, global_model.steps[-1])
        assert all_equal(copy_, global_model.model)
    assert global_model.graph.version == 1 and len(global_model.steps[1].edits) == 1


@pytest.mark.parametrize("value_bits", [2, 4])
def test_what_packing_loses_is_made_up_for_later(global_model, value_bits):
    start = read_unit(global_model.model, (0, 0))
    change = random_change(global_model.model, [(0, 0)])
    errors = []
    for rounds in range(1, 13):
        global_model.advance(change, value_bits=value_bits)
        moved = read_unit(global_model.model, (0, 0)) - start
        errors.append(float((moved - rounds * change[0, 0])[:1500].norm() / change[0, 0].norm()))
    # Without the residual the error would add up: twelve times that of the first round.
    assert errors[0] > 0.03 and errors[-1] < 12 / 2 * errors[0]


def test_units_without_a_change_do_not_move(global_model):
    before = {unit: read_unit(global_model.model, unit) for unit in unit_sizes(global_model.model)}
    global_model.advance(random_change(global_model.model, [(1, 2)]), value_bits=16)
    moved = [
        unit
        for unit, vector in before.items()
        if not torch.equal(vector, read_unit(global_model.model, unit))
    ]
    assert moved == [(1, 2)]


@pytest.mark.parametrize("nothing", [{}, {(0, 1): None}])
def test_a_step_without_a_change_moves_nothing_and_can_carry_edits(global_model, graph, nothing):
    size = unit_sizes(global_model.model)[0, 1]
    before = copy.deepcopy(global_model.model)
    global_model.advance({unit: torch.zeros(size) for unit in nothing}, value_bits=4)
    assert global_model.version == 1 and all_equal(global_model.model, before)
    global_model.edit([AddEdge(0, *free_pair(global_model))])
    other = load_graph(str(graph), dtype=torch.float32)
    apply_step(other, global_model.steps[-1])
    assert all_equal(other, global_model.model) and global_model.graph.version == 1


@pytest.mark.parametrize("value", [float("nan"), float("inf"), 1e35])
def test_a_step_that_is_not_finite_never_touches_the_model(global_model, value):
    before = copy.deepcopy(global_model.model)
    change = random_change(global_model.model, [(0, 0), (1, 1)])
    change[1, 1][5] = value
    with pytest.raises(UserError, match="finite step of unit .1, 1.*server-learning-rate"):
        global_model.advance(change, value_bits=4)
    assert all_equal(global_model.model, before) and (global_model.version, global_model.steps) == (0, [])


def test_a_sparse_downlink_sends_the_largest_entries_and_the_rest_later(global_model):
    change, start = random_change(global_model.model, [(0, 0)]), read_unit(global_model.model, (0, 0))
    dense = unit_sizes(global_model.model)[0, 0]
    global_model.advance(change, value_bits=16, density=0.1)
    first = read_unit(global_model.model, (0, 0)) - start
    assert int((first != 0).sum()) <= -(-dense // 10)
    assert first.abs().max() == pytest.approx(float(change[0, 0].abs().max()), rel=1e-2)
    # The same change again: the residual of the first outweighs the smallest new entries.
    for _ in range(40):
        global_model.advance({(0, 0): torch.full((dense,), 1e-9)}, value_bits=16, density=0.1)
    left = (read_unit(global_model.model, (0, 0)) - start - change[0, 0])[:1500]
    assert left.norm() < 0.01 * change[0, 0].norm()


def test_the_residual_of_a_unit_waits_until_clients_ship_it_again(global_model):
    global_model.advance(random_change(global_model.model, [(0, 0)]), value_bits=4, density=0.1)
    waiting = read_unit(global_model.model, (0, 0))
    global_model.advance(random_change(global_model.model, [(1, 1)]), value_bits=4, density=0.1)
    assert torch.equal(read_unit(global_model.model, (0, 0)), waiting)


def test_trying_edits_leaves_nothing_behind_even_after_an_error(global_model):
    with_random_gains(global_model.model)
    before = copy.deepcopy(global_model.model)
    edits = [RemoveEdge(0, 0, 1), RemoveEdge(1, 2, 3)]
    ids = random_ids(global_model.model)
    with torch.no_grad():
        usual = global_model.model(input_ids=ids).logits
        with global_model.trying(edits):
            assert not global_model.graph.masks[0][0, 1] and global_model.graph.version == 1
            assert global_model.model.expert_layers()[0].edge_gain[0, 1] == 0
            assert not torch.equal(global_model.model(input_ids=ids).logits, usual)
        assert torch.equal(global_model.model(input_ids=ids).logits, usual)
    assert all_equal(global_model.model, before)
    with pytest.raises(RuntimeError, match="stop"), global_model.trying(edits):
        raise RuntimeError("stop")
    with pytest.raises(UserError), global_model.trying([*edits, *edits]):
        pass
    assert all_equal(global_model.model, before)
    assert global_model.version == 0 and global_model.steps == []


def test_dense_bytes_are_all_ffn_weights_in_bf16(global_model):
    layers, hidden, width = 2, 32, 64
    assert global_model.dense_bytes() == layers * 3 * hidden * width * 2


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_the_checkpoint_written_is_the_model_in_the_dtype_it_came_in(tmp_path, tiny_tokenizer, dtype):
    (tmp_path / "graph").mkdir()
    save_checkpoint(cast_weights(graph_of(), dtype), tiny_tokenizer, tmp_path / "graph")
    global_model = GlobalModel(str(tmp_path / "graph"))
    assert global_model.model.dtype == torch.float32
    global_model.advance(random_change(global_model.model), value_bits=8)
    global_model.edit([AddEdge(0, *free_pair(global_model))])
    global_model.save(tmp_path / "out", overwrite=False)
    assert global_model.model.dtype == torch.float32  # the one that trains is left alone
    loaded = load_graph(str(tmp_path / "out"))
    assert loaded.dtype == dtype
    assert read_graph(loaded).digest() == global_model.graph.digest()
    for name, value in global_model.model.state_dict().items():
        written = loaded.state_dict()[name]
        assert torch.equal(written, value.to(written.dtype)), name
    gains = [layer.router.weight.dtype for layer in loaded.expert_layers()]
    assert gains == [torch.float32] * 2
    with pytest.raises(UserError, match="overwrite"):
        global_model.save(tmp_path / "out", overwrite=False)
    global_model.save(tmp_path / "out", overwrite=True)


def test_what_is_no_graph_is_refused(tiny_llama_dir, tmp_path):
    for source in (tiny_llama_dir, tmp_path):
        with pytest.raises(UserError):
            GlobalModel(str(source))


def test_the_graph_read_is_a_copy(global_model):
    global_model.graph.masks[0][:] = False
    assert np.diagonal(global_model.graph.masks[0]).all()


def advanced(global_model: GlobalModel, versions: int, units=((0, 0), (1, 2)), value_bits: int = 4) -> None:
    for _ in range(versions):
        change = random_change(global_model.model, units, seed=global_model.version)
        global_model.advance(change, value_bits=value_bits)


def test_a_snapshot_leads_from_the_checkpoint_to_the_model(global_model, graph):
    advanced(global_model, 2)
    global_model.edit([AddEdge(0, *free_pair(global_model))])
    fresh = load_graph(str(graph), dtype=torch.float32)
    assert apply_snapshot(fresh, global_model.snapshot(), 2) == {(0, 0), (1, 2)}
    assert all_equal(fresh, global_model.model)
    assert global_model.snapshot() is global_model.snapshot()


def test_hash_and_snapshot_follow_every_step_and_edit(global_model):
    seen = [(global_model.copy_hash, global_model.snapshot())]
    advanced(global_model, 1)
    seen.append((global_model.copy_hash, global_model.snapshot()))
    global_model.edit([AddEdge(0, *free_pair(global_model))])
    seen.append((global_model.copy_hash, global_model.snapshot()))
    assert len({hash_ for hash_, _ in seen}) == len({snapshot for _, snapshot in seen}) == 3
    moved = {unit: unit_digest(global_model.model, unit) for unit in ((0, 0), (1, 2))}
    assert global_model.copy_hash == copy_hash(global_model.model, moved)


def test_a_client_gets_the_steps_it_misses_or_a_snapshot_where_that_is_smaller(global_model):
    advanced(global_model, 3)
    assert global_model.catch_up(3) == ([], b"")
    assert global_model.catch_up(1) == (global_model.steps[1:], b"")
    assert global_model.catch_up(0) == (global_model.steps, b"")
    advanced(global_model, 20)
    steps, snapshot = global_model.catch_up(0)
    assert steps == [] and snapshot == global_model.snapshot()
    assert len(snapshot) < sum(step.size() for step in global_model.steps)
    steps, snapshot = global_model.catch_up(19)
    assert [step.version for step in steps] == [20, 21, 22, 23] and snapshot == b""


def test_many_small_steps_are_smaller_than_a_snapshot(global_model):
    advanced(global_model, 1)
    size = unit_sizes(global_model.model)[0, 0]
    for index in range(6):
        global_model.advance(
            {(0, 0): 0.1 * torch.nn.functional.one_hot(torch.tensor(index), size)}, value_bits=8
        )
    assert len(global_model.catch_up(1)[0]) == 6


def test_steps_that_nobody_needs_are_dropped_and_a_snapshot_takes_their_place(global_model):
    advanced(global_model, 3)
    global_model.drop_steps(2)
    assert [step.version for step in global_model.steps] == [3]
    assert global_model.catch_up(2) == (global_model.steps, b"")
    for held in (0, 1):
        assert global_model.catch_up(held) == ([], global_model.snapshot())


def test_steps_never_take_more_than_the_units_that_moved(global_model):
    sizes = []
    for _ in range(40):
        advanced(global_model, 1, value_bits=16)
        global_model.drop_steps(0)
        sizes.append(sum(step.size() for step in global_model.steps))
    assert max(sizes) <= 4 * 2 * unit_sizes(global_model.model)[0, 0]
    assert global_model.steps[-1].version == 40 and len(global_model.steps) < 10


def test_a_replayed_model_is_the_saved_one_and_goes_on_as_it_would(global_model, graph):
    advanced(global_model, 2)
    global_model.edit([RemoveEdge(0, *free_pair(global_model, edge=True))])
    saved = list(global_model.steps)
    again = GlobalModel(str(graph))
    again.replay(saved, global_model.residual, kept_from=1)
    assert all_equal(again.model, global_model.model) and again.version == 2
    assert again.copy_hash == global_model.copy_hash and [step.version for step in again.steps] == [2]
    for model in (global_model, again):
        advanced(model, 1)
    assert all_equal(again.model, global_model.model)
    assert again.steps[-1] == global_model.steps[-1]
