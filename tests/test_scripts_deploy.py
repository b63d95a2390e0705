"""A real SuperLink and two real SuperNodes on loopback, started and stopped by `scripts/deploy/local.sh`."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from scripts.deploy import submit
from tests.flower_apps import write_throwaway_app

SCRIPT = Path(__file__).parents[1] / "scripts" / "deploy" / "local.sh"


def deploy(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run([str(SCRIPT), *arguments], env=env, capture_output=True, text=True, timeout=300)


def processes_mentioning(text: str) -> list[str]:
    listing = subprocess.run(["ps", "-eo", "args"], capture_output=True, text=True).stdout
    return [line for line in listing.splitlines() if text in line]


def test_a_real_deployment_runs_the_job_with_private_data_and_stops(tmp_path):
    app = write_throwaway_app(tmp_path / "app")
    places = {"APP_DIR": str(app), "LOG_DIR": str(tmp_path / "logs"), "OUT": str(tmp_path / "seen.json")}
    data = {
        "DATA_DIR_1": str(tmp_path / "private data"),
        "FEDGRAFT_DATA": f"wikimix;{tmp_path}",
        "TIMEOUT": "180",
    }
    result = deploy("no 'graph'", "1", "fail=", **places, **data)
    assert (result.returncode, result.stderr) == (0, "")
    seen = json.loads((tmp_path / "seen.json").read_text())
    nodes = sorted((n["partition-id"], n["num-partitions"], n["data-dir"]) for n in seen["nodes"])
    assert nodes == [(0, 2, ""), (1, 2, str(tmp_path / "private data"))]
    assert seen["config"]["graph"] == str(Path.cwd() / "no 'graph'")
    assert (seen["config"]["num-rounds"], seen["config"]["data"]) == (1, f"wikimix;{tmp_path}")
    logs = ["flower.log", "superlink.log", "supernode0.log", "supernode1.log"]
    assert sorted(os.listdir(tmp_path / "logs")) == logs
    assert not os.path.exists(Path(seen["home"]).parent)
    assert processes_mentioning(str(tmp_path)) == []


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "GRAPH [ROUNDS]"),
        (("--help",), "GRAPH [ROUNDS]"),
        (("graph", "0"), "expected ROUNDS to be a number above 0"),
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


def test_submit_reports_failures_in_one_line_with_their_status(monkeypatch, capsys, tmp_path):
    monkeypatch.setattr("scripts.deploy.submit.wait_until_healthy", lambda port: None)
    arguments = ("run", "--app", str(tmp_path / "none"), "--port", "1", "--log", str(tmp_path / "log"))
    assert call(monkeypatch, *arguments, "novalue") == 2
    assert capsys.readouterr().err == "error: expected key=value, got 'novalue'\n"
    (tmp_path / "none").mkdir()
    assert call(monkeypatch, *arguments) == 1
    assert capsys.readouterr().err.startswith("error: `flwr run` failed: ")
