"""A real SuperLink and two real SuperNodes on loopback, started and stopped by `scripts/deploy/local.sh`."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from clients.state.store import ClientStore
from models.checkpoints.disk_experts import open_mapped
from models.graph.graph_state import read_graph
from tests.support.flower.apps import UNREACHABLE_PROXY
from tests.support.paths import ROOT
from tests.support.tiny_federation import assert_run_succeeded, run_values, save_tiny_graph, write_texts

SCRIPT = ROOT / "scripts" / "deploy" / "local.sh"


def deploy(*arguments: str, **environment: str) -> subprocess.CompletedProcess[str]:
    env = os.environ | {"PYTHON": sys.executable} | environment
    return subprocess.run([str(SCRIPT), *arguments], env=env, capture_output=True, text=True, timeout=900)


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
    data = {"FEDGRAFT_DATA": values["data"], "DATA_DIR_1": str(place / "private data"), "TIMEOUT": "800"}
    result = deploy(str(graph), "1", *settings, **places, **data, **UNREACHABLE_PROXY)
    assert result.returncode == 0, result.stderr
    assert "round 1/1" in result.stderr and "graph edits" in result.stdout
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
