"""A real SuperLink and two real SuperNodes on loopback, started and stopped by `scripts/deploy/local.sh`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from clients.state.store import ClientStore
from configs.errors import UserError
from configs.schema import RunConfig
from models.checkpoints.disk_experts import open_mapped
from models.graph.graph_state import read_graph
from scripts.deploy import submit
from server.state.journal import STATE_FOLDER
from server.state.run_lock import DRIVER_LOCK, check_unused, holding
from server.state.settings import Settings
from server.state.stop_request import stop_requested
from tests.support.flower.apps import UNREACHABLE_PROXY
from tests.support.paths import ROOT
from tests.support.tiny_federation import assert_run_succeeded, run_values, save_tiny_graph, write_texts

SCRIPT = ROOT / "scripts" / "deploy" / "local.sh"


def deploy(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run([str(SCRIPT), *arguments], env=env, capture_output=True, text=True, timeout=400)


def processes_mentioning(text: str) -> list[str]:
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if text in line]


def test_a_real_deployment_trains_with_private_data_and_stops(tmp_path, tiny_tokenizer):
    """Each message meets a fresh process on the client: what a round needs must be on the clients' disks."""
    place = tmp_path / "it's here"
    graph = save_tiny_graph(place / "graph", tiny_tokenizer, visits=2)
    values = run_values(graph, place, local_steps=2, rho_max=3, reply_timeout=120.0)
    values["data"] = write_texts(place / "shared", ["letters", "digits"])
    write_texts(place / "private data", ["digits"])
    named = ("graph", "data", "log-dir", "num-clients", "num-rounds")
    settings = [f"{key}={json.dumps(value)}" for key, value in values.items() if key not in named]
    places = {"LOG_DIR": str(place / "logs"), "OUT": str(place / "out"), "CACHE_DIR": str(place / "cache")}
    data = {"FEDGRAFT_DATA": values["data"], "DATA_DIR_1": str(place / "private data"), "TIMEOUT": "300"}
    result = deploy(str(graph), "1", *settings, **places, **data, **UNREACHABLE_PROXY)
    assert (result.returncode, result.stderr) == (0, "")
    logs = place / "logs"
    summary = json.loads((logs / "summary.json").read_text())
    assert summary["rounds"] == 1
    # The private client is known by its number alone.
    assert_run_succeeded(summary, logs=logs, out=place / "out", names=["letters", "client-1"])
    assert {"supernode0.log", "supernode1.log"} <= set(os.listdir(logs)) and "clients" not in os.listdir(logs)
    for client in (0, 1):
        (folder,) = (place / "cache" / f"client{client}").glob(f"run-*/client-{client}")
        kept = ClientStore(folder).copy
        model = open_mapped(str(graph), kept)
        assert kept.load(model) == 1
        assert read_graph(model).digest() == summary["graph_hash"]
    assert processes_mentioning(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "GRAPH [ROUNDS]"),
        (("--help",), "GRAPH [ROUNDS]"),
        (("graph", "0"), "expected ROUNDS to be a number above 0"),
        (("--resume",), "GRAPH [ROUNDS]"),
        (("--resume", "logs", "3"), "GRAPH [ROUNDS]"),
        (("--resume", "/no/such/logs"), "found no '/no/such/logs/state/settings.json'"),
    ],
)
def test_bad_arguments_exit_with_2_before_anything_starts(tmp_path, arguments, message):
    result = deploy(*arguments, LOG_DIR=str(tmp_path / "logs"))
    assert result.returncode == 2
    assert message in result.stderr
    assert result.stdout == ""
    assert not (tmp_path / "logs").exists()


def call(monkeypatch, *arguments: str) -> int:
    monkeypatch.setattr(sys, "argv", ["submit", *arguments])
    return submit.main()


def test_submit_prints_as_many_ports_as_asked(monkeypatch, capsys):
    assert call(monkeypatch, "ports", "3") == 0
    ports = [int(port) for port in capsys.readouterr().out.split()]
    assert len(set(ports)) == 3


def test_submit_has_a_run_save_its_model(monkeypatch, tmp_path):
    assert call(monkeypatch, "interrupt", str(tmp_path)) == 0
    assert stop_requested(tmp_path)

    def again(*_):
        raise KeyboardInterrupt

    monkeypatch.setattr("server.flower.flower_run.wait_until_unused", again)
    assert call(monkeypatch, "interrupt", str(tmp_path)) == 130


def test_submit_guards_a_job(monkeypatch, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    (tmp_path / "work").mkdir()
    stopped = []
    monkeypatch.setattr("server.flower.guard.stop_job", stopped.append)
    assert call(monkeypatch, "guard", "job", str(process.pid), str(tmp_path / "work")) == 0
    assert stopped == ["job"] and not (tmp_path / "work").exists()
    process.wait()


def test_submit_locks_the_log_directory_and_an_interrupt_exits_with_130(monkeypatch, capsys, tmp_path):
    def interrupted(*_, **__):
        with pytest.raises(UserError, match="in use by"):
            check_unused(tmp_path / "logs")
        raise KeyboardInterrupt

    monkeypatch.setattr("scripts.deploy.submit.wait_until_healthy", lambda port: None)
    monkeypatch.setattr("scripts.deploy.submit.run_and_wait", interrupted)
    arguments = ("run", "--app", str(tmp_path), "--port", "1", "--log", str(tmp_path / "log"))
    assert call(monkeypatch, *arguments, f"log-dir={tmp_path / 'logs'}") == 130
    assert "interrupted before the first round ended" in capsys.readouterr().err
    with holding(tmp_path / "logs", DRIVER_LOCK):
        assert call(monkeypatch, *arguments, f"log-dir={tmp_path / 'logs'}") == 2
    assert f"in use by process {os.getpid()}" in capsys.readouterr().err


def test_submit_continues_a_run_with_its_settings(monkeypatch, capsys, tmp_path):
    calls = []
    monkeypatch.setattr("scripts.deploy.submit.wait_until_healthy", lambda port: None)
    monkeypatch.setattr("scripts.deploy.submit.run_and_wait", lambda app, **options: calls.append(options))
    arguments = ("run", "--app", str(tmp_path), "--port", "1", "--log", str(tmp_path / "log"))
    arguments = (*arguments, "--resume", str(tmp_path / "logs"))
    assert call(monkeypatch, *arguments) == 2
    assert "expected the state of a run" in capsys.readouterr().err
    config = RunConfig(density=0.25, log_dir=str(tmp_path / "elsewhere"))
    Settings(7, "f", config.values()).write(tmp_path / "logs" / STATE_FOLDER)
    assert call(monkeypatch, *arguments) == 0
    (options,) = calls
    assert options["run_config"] == config.values() | {"resume": True, "log-dir": str(tmp_path / "logs")}
    assert call(monkeypatch, *arguments, "density=0.5") == 2
    assert "--resume without other options" in capsys.readouterr().err and len(calls) == 1


def test_submit_reports_failures_in_one_line_with_their_status(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("scripts.deploy.submit.wait_until_healthy", lambda port: None)
    arguments = ("run", "--app", str(tmp_path / "none"), "--port", "1", "--log", str(tmp_path / "log"))
    assert call(monkeypatch, *arguments, "novalue") == 2
    assert capsys.readouterr().err == "error: expected key=value, got 'novalue'\n"
    (tmp_path / "none").mkdir()
    assert call(monkeypatch, *arguments) == 1
    assert capsys.readouterr().err.startswith("error: `flwr run` failed: ")
