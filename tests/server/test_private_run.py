"""Federations with client-level differential privacy through the real apps."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from benchmarks.support.resume.killed_run import STAGES, dying
from configs.errors import UserError
from configs.schema import RunConfig
from federated.protocol.messages import read_reply
from models.checkpoints.load import load_graph
from scripts.shared.run_summary import summary_lines
from server import app as server_app
from server.app import run_federation
from server.flower.in_process_grid import RUN_ID, InProcessGrid
from server.privacy import noise_key
from server.privacy.accountant import spent_epsilon
from server.privacy.noise_key import NOISE_KEY
from tests.server.strategies.test_private import PRIVATE
from tests.support.tiny_federation import TinyGrid, all_equal, save_tiny_graph, tiny_config

pytest.importorskip("dp_accounting", reason="the extra privacy is not installed")

NOISE = 3.0


@pytest.fixture(scope="module")
def graph(tmp_path_factory, tiny_tokenizer) -> Path:
    return save_tiny_graph(
        tmp_path_factory.mktemp("graphs") / "graph", tiny_tokenizer, num_experts=4, visits=2
    )


@pytest.fixture(autouse=True)
def known_key(monkeypatch):
    """Two runs have the same noise only with the same key, which is random otherwise."""
    monkeypatch.setattr(noise_key.secrets, "token_bytes", lambda count: bytes(range(count)))


def private_config(graph: Path, folder: Path, **changes) -> RunConfig:
    own = {"num_clients": 2, "local_steps": 1, "out": str(folder / "out"), "dp_noise_multiplier": NOISE}
    return tiny_config(graph, folder, **{**PRIVATE, **own, "value_bits": 8, "dp_delta": 1e-5, **changes})


def rounds_of(config: RunConfig) -> list[dict]:
    return [json.loads(line) for line in (Path(config.log_dir) / "rounds.jsonl").read_text().splitlines()]


def test_epsilon_is_logged_in_every_round_and_in_the_summary(graph, tmp_path):
    config = private_config(graph, tmp_path)
    grid = TinyGrid(config)
    summary = run_federation(grid, config, run_id=RUN_ID)
    expected = [spent_epsilon(rounds, noise_multiplier=NOISE, delta=1e-5) for rounds in (1, 2, 3)]
    assert [row["epsilon"] for row in rounds_of(config)] == expected
    assert {row["delta"] for row in rounds_of(config)} == {1e-5}
    assert (summary["epsilon"], summary["delta"], summary["edits"]) == (expected[-1], 1e-5, 0)
    text = f"differential privacy of each client: epsilon {expected[-1]:.3f} at delta 1e-05"
    assert text in summary_lines(summary)
    assert summary["log_errors"] == {}
    assert not (Path(config.log_dir) / "state" / NOISE_KEY).exists()


def test_clients_report_neither_losses_nor_counts(graph, tmp_path):
    config = private_config(graph, tmp_path, num_rounds=1)
    grid = TinyGrid(config)
    run_federation(grid, config, run_id=RUN_ID)
    replies = [read_reply(reply.content, [4, 4]) for *_, reply in grid.sent if reply is not None]
    assert len(replies) == 4  # training and the final evaluation
    assert all(reply.numbers == {} and reply.usage == b"" for reply in replies)
    (row,) = rounds_of(config)
    assert (row["perplexity"], row["train_loss"]) == (None, None)


def test_only_rounds_with_an_update_of_a_client_count_for_it(graph, tmp_path):
    config = private_config(graph, tmp_path, num_rounds=2, fraction_train=0.5, seed=3)
    run_federation(TinyGrid(config), config, run_id=RUN_ID)
    trained = [[each["name"] for each in row["clients"]] for row in rounds_of(config)]
    most = 1 if trained[0] != trained[1] else 2
    assert rounds_of(config)[-1]["epsilon"] == spent_epsilon(most, noise_multiplier=NOISE, delta=1e-5)


def test_the_run_ends_before_it_exceeds_its_budget(graph, tmp_path):
    limit = spent_epsilon(2, noise_multiplier=NOISE, delta=1e-5) + 1e-6
    config = private_config(graph, tmp_path, dp_epsilon=limit)
    summary = run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert summary["rounds"] == 2 and summary["epsilon"] <= limit
    assert summary["stopped"].startswith("another round would exceed dp-epsilon")
    with pytest.raises(UserError, match="expected dp-epsilon of at least"):
        low = private_config(graph, tmp_path / "low", dp_epsilon=0.01)
        run_federation(TinyGrid(low), low, run_id=RUN_ID)


def test_usage_with_noise_edits_the_graph(graph, tmp_path):
    config = private_config(graph, tmp_path, dp_usage_noise=NOISE, rho_max=2)
    summary = run_federation(TinyGrid(config), config, run_id=RUN_ID)
    assert summary["epsilon"] == spent_epsilon(3, noise_multiplier=NOISE, usage_noise=NOISE, delta=1e-5)
    assert summary["edits"] > 0 and summary["log_errors"] == {}


class Killed(BaseException):
    """Stands for SIGKILL."""


def die() -> None:
    raise Killed


@pytest.mark.parametrize("stage", sorted(STAGES))
def test_a_private_run_that_was_killed_continues_bit_for_bit(graph, tmp_path, monkeypatch, stage):
    monkeypatch.setattr(server_app, "save_interrupted", lambda federation, error: None)
    usage = {"dp_usage_noise": NOISE, "rho_max": 2}
    undisturbed = private_config(graph, tmp_path / "undisturbed", **usage)
    run_federation(TinyGrid(undisturbed), undisturbed, run_id=RUN_ID)
    config = private_config(graph, tmp_path / "killed", **usage)
    grid = TinyGrid(config)
    kind, name, number, before = STAGES[stage]
    owner = grid if kind is InProcessGrid else kind
    with monkeypatch.context() as patch:
        patch.setattr(owner, name, dying(getattr(owner, name), number, before, die))
        with pytest.raises(Killed):
            run_federation(grid, config, run_id=RUN_ID)
    again = config.model_copy(update={"resume": True})
    summary = run_federation(TinyGrid(config), again, run_id=RUN_ID)
    assert all_equal(load_graph(config.out), load_graph(undisturbed.out))
    assert summary["epsilon"] == rounds_of(undisturbed)[-1]["epsilon"]
    assert [row["epsilon"] for row in rounds_of(config)] == [row["epsilon"] for row in rounds_of(undisturbed)]


def test_without_its_key_a_run_is_not_continued_but_a_finished_one_is_read(graph, tmp_path, monkeypatch):
    monkeypatch.setattr(server_app, "save_interrupted", lambda federation, error: None)
    config = private_config(graph, tmp_path, out="")
    grid = TinyGrid(config)
    monkeypatch.setattr(grid, "after", lambda server_round, node: die() if server_round == 2 else None)
    with pytest.raises(Killed):
        run_federation(grid, config, run_id=RUN_ID)
    again = config.model_copy(update={"resume": True})
    key = Path(config.log_dir) / "state" / NOISE_KEY
    held = key.read_bytes()
    key.unlink()
    with pytest.raises(UserError, match="expected the key of the noise"):
        run_federation(TinyGrid(config), again, run_id=RUN_ID)
    key.write_bytes(held)
    finished = run_federation(TinyGrid(config), again, run_id=RUN_ID)
    assert not key.exists()
    repeated = run_federation(TinyGrid(config), again, run_id=RUN_ID)
    assert (repeated["rounds"], repeated["epsilon"]) == (finished["rounds"], finished["epsilon"])


def test_another_key_gives_another_model(graph, tmp_path, monkeypatch):
    runs = []
    for name, fill in (("one", b"a"), ("two", b"b")):
        monkeypatch.setattr(noise_key.secrets, "token_bytes", lambda count, fill=fill: fill * count)
        config = private_config(graph, tmp_path / name, num_rounds=1)
        run_federation(TinyGrid(config), config, run_id=RUN_ID)
        runs.append(load_graph(config.out))
    assert not all_equal(*runs)
