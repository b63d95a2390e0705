"""Runs that are killed at some stage and continued: the same model, logs and summary as those of an undisturbed run."""

from __future__ import annotations

import json
import logging
import shutil
from pathlib import Path

import pytest
from flwr.app import Context, RecordDict

from benchmarks.support.resume.killed_run import STAGES, dying
from configs.errors import UserError
from configs.schema import RunConfig
from models.checkpoints.load import load_graph
from server import app as server_app
from server.app import run_federation
from server.flower.in_process_grid import RUN_ID, InProcessGrid
from tests.support.tiny_federation import TinyGrid, all_equal, save_tiny_graph, tiny_config


class Killed(BaseException):
    """Stands for SIGKILL: nothing after it runs but the end of ``with`` blocks."""


@pytest.fixture(scope="module")
def graph(tmp_path_factory, tiny_tokenizer) -> Path:
    return save_tiny_graph(
        tmp_path_factory.mktemp("resume") / "graph", tiny_tokenizer, num_experts=4, visits=2
    )


@pytest.fixture(autouse=True)
def no_rescue(monkeypatch):
    """A killed process does not save the interrupted run."""
    monkeypatch.setattr(server_app, "save_interrupted", lambda federation, error: None)


def config_in(graph: Path, folder: Path, **changes) -> RunConfig:
    own = {"local_steps": 1, "num_rounds": 3, "expert_budget": 3, "out": str(folder / "out")}
    return tiny_config(graph, folder, **own, **changes)


@pytest.fixture(scope="module")
def undisturbed(graph, tmp_path_factory) -> dict:
    config = config_in(graph, tmp_path_factory.mktemp("undisturbed"))
    return run_federation(TinyGrid(config), config, run_id=RUN_ID) | {"config": config}


def die() -> None:
    raise Killed


def kill_at(stage: str, grid: TinyGrid, patch: pytest.MonkeyPatch) -> None:
    """Raise ``Killed`` at a stage of round 2."""
    kind, name, number, before = STAGES[stage]
    owner = grid if kind is InProcessGrid else kind
    patch.setattr(owner, name, dying(getattr(owner, name), number, before, die))


def resumed(config: RunConfig) -> RunConfig:
    return config.model_copy(update={"resume": True})


@pytest.mark.parametrize("stage", STAGES)
def test_a_run_killed_at_any_stage_goes_on_as_if_undisturbed(
    graph, tmp_path, undisturbed, monkeypatch, stage
):
    config = config_in(graph, tmp_path)
    grid = TinyGrid(config)
    with monkeypatch.context() as patch:
        kill_at(stage, grid, patch)
        with pytest.raises(Killed):
            run_federation(grid, config, run_id=RUN_ID)
    assert not Path(config.out).exists()
    grid = TinyGrid(config)
    grid.node_ids = [each + 5000 for each in grid.node_ids]  # restarted nodes
    grid.contexts = {each + 5000: context for each, context in grid.contexts.items()}
    for context in grid.contexts.values():
        context.run_id = RUN_ID + 1
    summary = run_federation(grid, resumed(config), run_id=RUN_ID + 1)
    assert_same(summary, undisturbed, config)


def assert_same(summary: dict, undisturbed: dict, config: RunConfig) -> None:
    """The model, the summary and the logs are those of the undisturbed run, apart from times and bytes."""
    assert all_equal(load_graph(summary["out"]), load_graph(undisturbed["out"]))
    assert summary["best"].pop("out") == summary["out"] and summary["best"] == summary["last"]
    free = {"out", "log_dir", "bytes_up", "bytes_down", "config", "best"}
    assert {key: value for key, value in summary.items() if key not in free} == {
        key: value
        for key, value in undisturbed.items()
        if key not in free | {"bytes_up_dense", "bytes_down_dense"}
    } | {key: summary[key] for key in ("bytes_up_dense", "bytes_down_dense")}
    rows, expected = (
        [json.loads(line) for line in (Path(folder) / "rounds.jsonl").read_text().splitlines()]
        for folder in (config.log_dir, undisturbed["log_dir"])
    )
    assert [row["round"] for row in rows] == [1, 2, 3]
    for name in ("graph_hash", "perplexity", "train_loss", "edges", "step_bytes"):
        assert [row[name] for row in rows] == [row[name] for row in expected]


def test_a_truncated_state_falls_back_to_the_one_before(graph, tmp_path, undisturbed, caplog):
    config = config_in(graph, tmp_path)
    run_federation(TinyGrid(config), config.model_copy(update={"out": ""}), run_id=RUN_ID)
    state = Path(config.log_dir) / "state"
    assert sorted(path.name for path in state.glob("round-*")) == [
        "round-2.safetensors",
        "round-3.safetensors",
    ]
    newest = state / "round-3.safetensors"
    newest.write_bytes(newest.read_bytes()[:-100])
    with caplog.at_level(logging.WARNING):
        summary = run_federation(TinyGrid(config), resumed(config), run_id=RUN_ID)
    assert "the state of round 3" in caplog.text and "damaged" in caplog.text
    assert_same(summary, undisturbed, config)


def test_without_an_intact_state_nothing_is_trained(graph, tmp_path):
    config = config_in(graph, tmp_path)
    run_federation(TinyGrid(config), config.model_copy(update={"out": ""}), run_id=RUN_ID)
    for path in (Path(config.log_dir) / "state").glob("round-*"):
        path.write_bytes(b"")
    grid = TinyGrid(config)
    with pytest.raises(UserError, match="only damaged ones"):
        run_federation(grid, resumed(config), run_id=RUN_ID)
    assert grid.sent == []


def test_other_settings_and_another_graph_are_refused_with_their_difference(graph, tmp_path, tiny_tokenizer):
    config = config_in(graph, tmp_path)
    with pytest.raises(UserError, match="expected the state of a run, found no .*settings.json"):
        run_federation(TinyGrid(config), resumed(config), run_id=RUN_ID)
    run_federation(TinyGrid(config), config.model_copy(update={"out": ""}), run_id=RUN_ID)
    changed = resumed(config).model_copy(update={"density": 0.25, "reply_timeout": 9.0})
    with pytest.raises(
        UserError, match=r"got density = 0.25 in place of 0.5; only these keys may change: .*out"
    ):
        run_federation(TinyGrid(config), changed, run_id=RUN_ID)
    other = save_tiny_graph(tmp_path / "other", tiny_tokenizer, num_experts=8, visits=2)
    with pytest.raises(UserError, match="expected the graph .* that the run was started with"):
        run_federation(
            TinyGrid(config), resumed(config).model_copy(update={"graph": str(other)}), run_id=RUN_ID
        )


def test_a_graph_that_was_moved_continues_its_run(graph, tmp_path, undisturbed):
    config = config_in(graph, tmp_path)
    run_federation(TinyGrid(config), config.model_copy(update={"out": ""}), run_id=RUN_ID)
    moved = resumed(config).model_copy(update={"graph": str(shutil.copytree(graph, tmp_path / "moved"))})
    assert_same(run_federation(TinyGrid(moved), moved, run_id=RUN_ID), undisturbed, config)


def test_what_a_killed_run_left_half_written_is_removed(graph, tmp_path):
    """Replies of the round, the final model and checkpoints."""
    config = config_in(graph, tmp_path, checkpoint_every=1)
    logs = Path(config.log_dir)
    run_federation(TinyGrid(config), config.model_copy(update={"out": ""}), run_id=RUN_ID)
    assert {path.name for path in (logs / "checkpoints").glob("round-?")} == {"round-2", "round-3"}
    (logs / "state" / "round-3.safetensors").unlink()
    left = [logs / ".replies.abc", tmp_path / ".out.abc.partial"]
    left += [logs / "checkpoints" / name for name in (".round-2.abc.partial", ".best.abc.partial")]
    for folder in left:
        (folder / "x").mkdir(parents=True)
    values = resumed(config).values()
    server_app.main(TinyGrid(config), server_context(values))
    assert Path(config.out).is_dir() and not any(folder.exists() for folder in left)


def server_context(values: dict) -> Context:
    """Context of a ServerApp with this run configuration."""
    return Context(run_id=RUN_ID, node_id=0, node_config={}, state=RecordDict(), run_config=values)


def test_the_state_on_disk_is_bounded(graph, tmp_path):
    config = config_in(graph, tmp_path, downlink_density=0.2)
    run_federation(TinyGrid(config), config, run_id=RUN_ID)
    state = Path(config.log_dir) / "state"
    names = {path.name for path in state.iterdir()}
    steps = {f"step-{version}.safetensors" for version in (1, 2, 3)}
    rounds = {"round-2.safetensors", "round-3.safetensors"}
    assert names == steps | rounds | {"settings.json", "resume.toml"}
    model = sum(each.numel() for each in load_graph(str(graph)).state_dict().values()) * 4
    newest = (state / "round-3.safetensors").stat().st_size
    assert newest + sum((state / name).stat().st_size for name in steps) < 1.2 * model + 20_000
