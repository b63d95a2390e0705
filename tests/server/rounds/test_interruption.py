"""Runs that end with an exception: the trained model, the state and the summary are on disk before it is raised."""

from __future__ import annotations

import errno
import json
import os
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from flwr.app import Error, Message

from configs.errors import UserError
from configs.output import OutputKept
from configs.schema import RunConfig
from federated.protocol.messages import BAD_INPUT
from models.checkpoints.load import load_graph
from models.graph.graph_state import read_graph
from server import app as server_app
from server.app import open_global_model, run_federation
from server.flower.in_process_grid import RUN_ID, Drop
from server.model.global_model import GlobalModel
from server.rounds import loop
from server.state.federation_state import FederationState
from tests.support.tiny_federation import TinyGrid, request_of, save_tiny_graph, tiny_config


@pytest.fixture(scope="module")
def graph(tmp_path_factory, tiny_tokenizer) -> Path:
    directory = tmp_path_factory.mktemp("interruption") / "graph"
    return save_tiny_graph(directory, tiny_tokenizer, num_experts=4, visits=2)


@pytest.fixture
def config(graph, tmp_path) -> RunConfig:
    return tiny_config(graph, tmp_path, local_steps=1, reply_timeout=0.3, out=str(tmp_path / "out"))


@pytest.fixture
def models(monkeypatch) -> list[GlobalModel]:
    """The global models that ``run_federation`` opens."""
    opened: list[GlobalModel] = []

    def keep(config: RunConfig) -> GlobalModel:
        opened.append(open_global_model(config))
        return opened[-1]

    monkeypatch.setattr(server_app, "open_global_model", keep)
    return opened


def in_round(server_round: int, fault) -> dict:
    """A fault of both nodes."""
    return {(node, str(server_round)): fault for node in (0, 1)}


def first_only(error: Error) -> Callable[[Message], Message]:
    """A fault that puts ``error`` in place of the first reply and lets later ones through."""
    seen: list[Message] = []

    def change(reply: Message) -> Message:
        seen.append(reply)
        return reply if len(seen) > 1 else Message(error, reply_to=request_of(reply))

    return change


def assert_saved(folder: Path, model: GlobalModel) -> None:
    """A checkpoint holds the model in the dtype of its source, with its graph."""
    loaded = load_graph(str(folder))
    assert read_graph(loaded).digest() == model.graph.digest()
    for name, value in model.model.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value.to(loaded.state_dict()[name].dtype))


def summary_of(config: RunConfig) -> dict:
    return json.loads((Path(config.log_dir) / "summary.json").read_text())


def state_of(config: RunConfig, server_round: int) -> FederationState:
    path = Path(config.log_dir) / "checkpoints" / f"round-{server_round}.state.safetensors"
    return FederationState.from_bytes(path.read_bytes())


def test_without_any_answer_in_a_later_round_the_trained_model_is_kept(config, models):
    grid = TinyGrid(config, faults=in_round(2, Drop()))
    with pytest.raises(RuntimeError, match="^no client gave a usable update: no answer within 0 s$"):
        run_federation(grid, config, run_id=RUN_ID)
    (model,) = models
    assert model.version == 1
    assert_saved(Path(config.out), model)
    summary = summary_of(config)
    assert summary["stopped"] == "no client gave a usable update: no answer within 0 s"
    assert (summary["rounds"], summary["out"]) == (1, config.out)
    assert [client["perplexity_after"] for client in summary["clients"]] == [None, None]
    # Both exchanges of the round were sent.
    assert [r for r, *_ in grid.sent] == [1, 1, 2, 2, 2, 2]
    assert (summary["bytes_up"], summary["bytes_down"]) == (grid.bytes_up, grid.bytes_down)
    state = state_of(config, 1)
    assert (state.server_round, state.model_version, state.stopped) == (1, 1, summary["stopped"])
    assert {each.accepted_round for each in state.sessions.values()} == {1}
    assert state.graph_version == model.graph.version


def test_a_continued_run_replaces_the_model_that_it_saved_and_no_other(config, models):
    with pytest.raises(RuntimeError):
        run_federation(TinyGrid(config, faults=in_round(2, Drop())), config, run_id=RUN_ID)
    continued = config.model_copy(update={"resume": True})
    os.rename(config.out, f"{config.out}.saved")
    os.mkdir(config.out)
    (Path(config.log_dir) / "summary.json").write_text(json.dumps(summary_of(config) | {"out": "/other"}))
    (Path(config.out) / "precious").touch()
    with pytest.raises(UserError, match="expected an empty output directory"):
        run_federation(TinyGrid(config), continued, run_id=RUN_ID)
    (Path(config.log_dir) / "summary.json").write_text(json.dumps(summary_of(config) | {"out": config.out}))
    assert run_federation(TinyGrid(config), continued, run_id=RUN_ID)["rounds"] == 3
    assert_saved(Path(config.out), models[-1])


def test_without_out_the_model_is_a_checkpoint_of_the_log_directory(config, models):
    config = config.model_copy(update={"out": ""})
    with pytest.raises(RuntimeError):
        run_federation(TinyGrid(config, faults=in_round(3, Drop())), config, run_id=RUN_ID)
    folder = Path(config.log_dir) / "checkpoints" / "round-2"
    assert_saved(folder, models[0])
    assert (summary_of(config)["out"], summary_of(config)["rounds"]) == (str(folder), 2)


def test_a_round_without_a_usable_reply_is_repeated_once(config, models):
    """The second exchange completes the round; the bytes of the first count."""
    gone = Error(code=5, reason="gone")
    grid = TinyGrid(config, faults={(0, "2"): first_only(gone), (1, "2"): first_only(gone)})
    summary = run_federation(grid, config, run_id=RUN_ID)
    assert (summary["rounds"], summary["stopped"]) == (3, None)
    assert [r for r, *_ in grid.sent] == [1, 1, 2, 2, 2, 2, 3, 3, 4, 4]
    rows = [json.loads(line) for line in (Path(config.log_dir) / "rounds.jsonl").read_text().splitlines()]
    assert [client["refused"] for row in rows for client in row["clients"]] == [None] * 6
    assert (summary["bytes_up"], summary["bytes_down"]) == (grid.bytes_up, grid.bytes_down)
    assert rows[1]["bytes_down"] > 1.5 * rows[2]["bytes_down"]
    assert_saved(Path(config.out), models[0])


def test_before_the_first_trained_round_nothing_is_saved(config):
    with pytest.raises(RuntimeError, match="no client gave a usable update"):
        run_federation(TinyGrid(config, faults=in_round(1, Drop())), config, run_id=RUN_ID)
    assert not Path(config.out).exists()
    assert not (Path(config.log_dir) / "summary.json").exists()
    assert not (Path(config.log_dir) / "checkpoints").exists()


def test_bad_input_that_clients_report_is_not_repeated_and_stays_a_user_error(config):
    fault = Error(code=BAD_INPUT, reason="expected text, got none")
    for server_round in (1, 2):
        grid = TinyGrid(config, faults=in_round(server_round, fault))
        with pytest.raises(UserError, match="^expected text, got none$"):
            run_federation(grid, config, run_id=RUN_ID)
        assert [r for r, *_ in grid.sent].count(server_round) == 2
        assert Path(config.out).exists() == (server_round == 2)
    assert summary_of(config)["stopped"] == "expected text, got none"


@pytest.mark.parametrize("error", [OSError("no space"), KeyboardInterrupt()])
def test_any_exception_after_a_trained_round_saves_the_model(config, models, monkeypatch, error):
    def fail(*_):
        raise error

    monkeypatch.setattr(loop, "check_evaluations", fail)
    with pytest.raises(type(error)):
        run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert_saved(Path(config.out), models[0])
    assert summary_of(config)["rounds"] == 3
    assert summary_of(config)["stopped"] == (str(error) or "KeyboardInterrupt")


def test_where_out_cannot_be_written_the_model_goes_to_the_log_directory(config, models):
    """The output folder receives a foreign file during the run."""
    grid = TinyGrid(config)

    def occupy(server_round: int, node: int) -> None:
        Path(config.out).mkdir(exist_ok=True)
        (Path(config.out) / "precious").write_text("x")

    grid.before = occupy
    with pytest.raises(UserError, match="overwrite"):
        run_federation(grid, config, run_id=RUN_ID)
    folder = Path(config.log_dir) / "checkpoints" / "round-3"
    assert_saved(folder, models[0])
    assert summary_of(config)["out"] == str(folder)
    assert (Path(config.out) / "precious").read_text() == "x"


def test_a_failure_to_save_does_not_hide_the_cause(config, models, monkeypatch, caplog):
    def full(*_, **__):
        raise OSError("disk full")

    monkeypatch.setattr(GlobalModel, "save", full)
    with pytest.raises(RuntimeError, match="no client gave a usable update"):
        run_federation(TinyGrid(config, faults=in_round(2, Drop())), config, run_id=RUN_ID)
    assert "the interrupted run could not be saved" in caplog.text and "disk full" in caplog.text


def test_checkpoints_hold_the_state_of_their_round(graph, tmp_path):
    config = tiny_config(graph, tmp_path, num_rounds=2, local_steps=1, checkpoint_every=1)
    run_federation(TinyGrid(config), config, run_id=RUN_ID)
    for server_round in (1, 2):
        folder = Path(config.log_dir) / "checkpoints" / f"round-{server_round}"
        state = state_of(config, server_round)
        assert (state.server_round, state.model_version) == (server_round, server_round)
        assert state.graph_version == read_graph(load_graph(str(folder))).version
        assert len(state.usage.counts) == 2 and len(state.sessions) == 2


def refuse_renames(monkeypatch, out: Path, number: int) -> None:
    """Fail every rename that names ``out``."""
    replace = os.replace

    def refuse(source, target) -> None:
        if out in (Path(source), Path(target)):
            raise OSError(number, os.strerror(number))
        replace(source, target)

    monkeypatch.setattr(os, "replace", refuse)


def test_a_model_in_an_empty_mount_point_is_saved_there(config, models, monkeypatch):
    Path(config.out).mkdir()
    refuse_renames(monkeypatch, Path(config.out), errno.EBUSY)
    summary = run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert summary["out"] == config.out
    assert_saved(Path(config.out), models[0])


def test_a_model_that_cannot_be_moved_to_out_is_written_once_and_named(config, models, monkeypatch, tmp_path):
    refuse_renames(monkeypatch, Path(config.out), errno.EIO)
    with pytest.raises(OutputKept, match="Input/output error; it is complete in .*partial") as error:
        run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert_saved(error.value.folder, models[0])
    assert summary_of(config)["out"] == str(error.value.folder)
    assert state_of(config, 3).server_round == 3
    assert list(tmp_path.rglob("*.partial")) == [error.value.folder]


def test_a_model_of_a_failed_run_that_cannot_be_moved_is_kept_as_well(config, models, monkeypatch, tmp_path):
    refuse_renames(monkeypatch, Path(config.out), errno.EIO)
    with pytest.raises(RuntimeError, match="no client gave a usable update"):
        run_federation(TinyGrid(config, faults=in_round(2, Drop())), config, run_id=RUN_ID)
    (kept,) = tmp_path.rglob("*.partial")
    assert_saved(kept, models[0])
    assert summary_of(config)["out"] == str(kept) and state_of(config, 1).server_round == 1
