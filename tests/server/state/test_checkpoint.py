from __future__ import annotations

from pathlib import Path

import pytest

from models.checkpoints.load import load_graph
from server.model.global_model import GlobalModel
from server.state.checkpoint import write_checkpoint
from server.state.federation_state import FederationState
from tests.support.tiny_federation import all_equal, random_change, save_tiny_graph


@pytest.fixture
def global_model(tmp_path, tiny_tokenizer) -> GlobalModel:
    return GlobalModel(str(save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=2)))


def test_a_checkpoint_is_the_model_as_it_is(global_model, tmp_path):
    state = FederationState(server_round=4)
    folder = write_checkpoint(tmp_path, global_model, state)
    assert folder == tmp_path / "checkpoints" / "round-4"
    assert all_equal(load_graph(str(folder)), global_model.model)
    global_model.advance(random_change(global_model.model), value_bits=8)
    assert write_checkpoint(tmp_path, global_model, state) == folder
    assert all_equal(load_graph(str(folder)), global_model.model)


def test_the_latest_checkpoints_stay_and_what_a_killed_process_left_is_removed(global_model, tmp_path):
    folder = tmp_path / "checkpoints"
    (folder / ".round-2.abc.partial").mkdir(parents=True)
    (folder / "best").mkdir()
    for server_round in (2, 9, 10, 11):
        write_checkpoint(tmp_path, global_model, FederationState(server_round=server_round), keep=2)
    names = {path.name for path in folder.iterdir()}
    assert names == {"best", *(f"round-{n}{end}" for n in (10, 11) for end in ("", ".state.safetensors"))}
    write_checkpoint(tmp_path, global_model, FederationState(server_round=12))
    assert (folder / "round-10").exists()


def test_the_state_lies_next_to_the_model(global_model, tmp_path):
    state = FederationState(server_round=2, model_version=2, stopped="why")
    write_checkpoint(tmp_path, global_model, state)
    assert sorted(path.name for path in Path(tmp_path / "checkpoints").iterdir()) == [
        "round-2",
        "round-2.state.safetensors",
    ]
    data = (tmp_path / "checkpoints" / "round-2.state.safetensors").read_bytes()
    assert FederationState.from_bytes(data) == state
