"""Runs with planted held-out losses: the model of the lowest one is kept beside the last."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Sequence
from pathlib import Path

import pytest

from configs.schema import RunConfig
from models.checkpoints.load import load_graph
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.runtime.perplexity import LossSum
from server.app import run_federation
from server.flower.in_process_grid import RUN_ID, Drop
from server.rounds import loop
from server.rounds.validation import Evaluations
from server.state import settings
from server.state.journal import Journal
from tests.support.tiny_federation import TinyGrid, all_equal, in_memory, save_tiny_graph, tiny_config


@pytest.fixture(scope="module")
def graph(tmp_path_factory, tiny_tokenizer) -> Path:
    folder = tmp_path_factory.mktemp("best") / "graph"
    return save_tiny_graph(folder, tiny_tokenizer, num_experts=4, visits=2)


@pytest.fixture
def config(graph, tmp_path) -> RunConfig:
    return tiny_config(
        graph, tmp_path, local_steps=1, num_rounds=4, out=str(tmp_path / "out"), trace_tokens=0
    )


@pytest.fixture
def models(monkeypatch, graph) -> list[FedGraftForCausalLM]:
    """The global model as bootstrapped and after each saved round."""
    found, save = [load_graph(str(graph))], Journal.save

    def keep(journal, global_model, state, history):
        del found[state.server_round :]
        found.append(in_memory(global_model.model))
        save(journal, global_model, state, history)

    monkeypatch.setattr(Journal, "save", keep)
    return found


def plant(monkeypatch, losses: Sequence[float]) -> None:
    """Set the held-out losses of the model before each round, and after the last one."""

    def loss_of(number: int) -> LossSum:
        return LossSum(losses[number] * 10, 10)

    original, rounds = loop.Federation._exchange, [0]

    def exchange(self, server_round, *rest):
        rounds.append(server_round)
        return original(self, server_round, *rest)

    monkeypatch.setattr(loop.Federation, "_exchange", exchange)
    monkeypatch.setattr(loop, "held_out_loss", lambda replies: loss_of(rounds[-1] - 1))
    monkeypatch.setattr(Evaluations, "loss", property(lambda self: loss_of(len(losses) - 1)))


def best_folder(config: RunConfig) -> Path:
    return Path(config.log_dir) / "checkpoints" / "best"


def entry(number: int, loss: float, out: Path | str = "") -> dict:
    return {"round": number, "perplexity": pytest.approx(math.exp(loss)), "out": str(out)}


@pytest.mark.parametrize("losses, best", [([3.0, 2.0, 1.5, 2.5, 2.0], 2), ([1.0, 2.0, 2.0, 2.0, 2.0], 0)])
def test_the_model_of_the_lowest_loss_is_kept_beside_the_last(
    config, models, monkeypatch, caplog, losses, best
):
    plant(monkeypatch, losses)
    with caplog.at_level(logging.INFO, logger="flwr"):
        summary = run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert summary["best"] == entry(best, losses[best], best_folder(config))
    assert summary["last"] == {"round": 4, "perplexity": pytest.approx(math.exp(losses[-1]))}
    assert summary == json.loads((Path(config.log_dir) / "summary.json").read_text())
    assert all_equal(load_graph(str(best_folder(config))), models[best])
    assert all_equal(load_graph(config.out), models[4]) and not all_equal(models[4], models[best])
    assert f"last model: round 4, perplexity {math.exp(losses[-1]):.3f}, in {config.out}" in caplog.messages
    line = f"best model: round {best}, perplexity {math.exp(losses[best]):.3f}, in {best_folder(config)}"
    assert line in caplog.messages
    assert [path.name for path in best_folder(config).parent.iterdir()] == ["best"]  # nothing else on disk


def test_where_the_last_model_is_the_best_it_is_not_written_twice(config, monkeypatch):
    plant(monkeypatch, [3.0, 2.0, 1.5, 2.5, 1.0])
    best_folder(config).mkdir(parents=True)
    summary = run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert summary["best"] == entry(4, 1.0, config.out)
    assert not best_folder(config).exists()


@pytest.mark.parametrize("changes", [{"keep_best": False}, {"out": ""}])
def test_without_the_key_or_a_final_model_the_best_is_named_but_not_written(config, monkeypatch, changes):
    plant(monkeypatch, [3.0, 2.0, 1.5, 2.5, 2.0])
    config = config.model_copy(update=changes)
    summary = run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert summary["best"] == entry(2, 1.5)
    assert not best_folder(config).exists()


def test_without_held_out_text_there_is_no_best(config, monkeypatch):
    monkeypatch.setattr(loop, "held_out_loss", lambda replies: LossSum())
    monkeypatch.setattr(Evaluations, "loss", property(lambda self: LossSum()))
    summary = run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert summary["best"] is None and summary["last"] == {"round": 4, "perplexity": None}
    assert not best_folder(config).exists()


def test_an_interrupted_run_keeps_its_best_and_the_continued_one_replaces_it(config, models, monkeypatch):
    plant(monkeypatch, [3.0, 1.5, 2.0, 1.0, 2.0])
    grid = TinyGrid(config, faults={(node, "3"): Drop() for node in (0, 1)})
    with pytest.raises(RuntimeError, match="no client gave a usable update"):
        run_federation(grid, config, run_id=RUN_ID)
    summary = json.loads((Path(config.log_dir) / "summary.json").read_text())
    assert summary["best"] == entry(1, 1.5, best_folder(config))
    assert summary["last"] == {"round": 2, "perplexity": None}
    assert all_equal(load_graph(str(best_folder(config))), models[1])
    continued = config.model_copy(update={"resume": True})
    summary = run_federation(TinyGrid(config), continued, run_id=RUN_ID)
    assert summary["best"] == entry(3, 1.0, best_folder(config))
    assert all_equal(load_graph(str(best_folder(config))), models[3])


def test_the_best_of_the_rounds_before_a_kill_is_kept_by_the_continued_run(config, models, monkeypatch):
    plant(monkeypatch, [3.0, 1.5, 2.0, 2.5, 2.0])
    first = config.model_copy(update={"num_rounds": 3, "out": ""})
    monkeypatch.setattr(settings, "MAY_CHANGE", (*settings.MAY_CHANGE, "num-rounds"))
    run_federation(TinyGrid(first), first, run_id=RUN_ID)
    continued = config.model_copy(update={"resume": True})
    summary = run_federation(TinyGrid(config), continued, run_id=RUN_ID)
    assert summary["best"] == entry(1, 1.5, best_folder(config))
    assert all_equal(load_graph(str(best_folder(config))), models[1])


@pytest.mark.parametrize("damage", ["step", "disk"])
def test_a_best_model_that_cannot_be_written_is_named_and_the_last_is_kept(config, monkeypatch, damage):
    plant(monkeypatch, [3.0, 1.5, 2.0, 2.5, 2.0])
    if damage == "step":
        monkeypatch.setattr(Journal, "steps", lambda self, version: None)
    else:
        monkeypatch.setattr("server.rounds.best_model.override_routing", full)
    summary = run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert summary["best"] == entry(1, 1.5)
    (reason,) = summary["log_errors"].values()
    assert list(summary["log_errors"]) == ["checkpoints/best"]
    assert ("expected 1 intact steps" if damage == "step" else "No space left") in reason
    load_graph(config.out)


def full(*_) -> None:
    raise OSError("No space left on device")


def test_another_model_than_the_measured_one_is_not_kept(config, monkeypatch):
    plant(monkeypatch, [3.0, 1.5, 2.0, 2.5, 2.0])
    read = Journal.steps
    monkeypatch.setattr(Journal, "steps", lambda self, version: read(self, version + 1))
    summary = run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert "expected the model of round 1" in summary["log_errors"]["checkpoints/best"]
    assert not best_folder(config).exists()
