"""Failures of real processes during a run: the rest goes on, and the final model is the one that was to be expected.

The expected model is that of an in-process run in which the same clients are missing in the same rounds.
"""

from __future__ import annotations

import json
import subprocess
import time
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pytest
from flwr.app import Error, Message

from benchmarks.support.flower.deployment import (
    OWN_NAMESPACE,
    POLL_SECONDS,
    Deployment,
    Node,
    deployment,
    wait_until,
)
from benchmarks.support.resume.killed_run import weights_hash
from clients.client_app import app
from configs.schema import load_run_config
from server.app import run_federation
from server.flower.in_process_grid import RUN_ID, Fault, InProcessGrid
from server.reporting.run_log import read_rounds
from server.state.journal import STATE_FOLDER
from tests.support.tiny_federation import TEXTS, run_values, save_tiny_graph, write_texts

pytestmark = pytest.mark.processes


@pytest.fixture(scope="module")
def graph(tmp_path_factory, tiny_tokenizer) -> Path:
    return save_tiny_graph(
        tmp_path_factory.mktemp("failures") / "graph", tiny_tokenizer, num_experts=4, visits=2
    )


def settings_in(folder: Path, graph: Path, **keys: Any) -> dict[str, Any]:
    own = {"local_steps": 2, "reply_timeout": 120.0, "trace_tokens": 0, "min_clients": 1, "keep_best": False}
    return run_values(graph, folder, **{**own, **keys}, out=str(folder / "out"))


def submit(started: Deployment, settings: Mapping[str, Any]) -> subprocess.Popen[str]:
    return started.fedgraft(
        "submit", *(f"--set={key}={json.dumps(value)}" for key, value in settings.items())
    )


def data_of(folder: Path, index: int) -> str:
    """Data folder of a client, with texts of its own."""
    write_texts(folder / f"data{index}", [sorted(TEXTS)[index % 2]])
    return str(folder / f"data{index}")


def fates(logs: Path, index: int) -> dict[int, str | None]:
    """Why the update of a client is not in the model of a round, by round; None where it is."""
    records = ((each["round"], client) for each in read_rounds(logs) for client in each["clients"])
    return {number: each["refused"] for number, each in records if each["name"] == f"client-{index}"}


MISSING = Error(code=9, reason="missing")  # fault: the client does not train


def on_the_way(reply: Message) -> Message:
    """Fault: the client has trained, and its update does not count."""
    return Message(Error(code=9, reason="refused"), reply_to=reply)


def expected_hash(
    settings: Mapping[str, Any], folder: Path, data: Sequence[str], faults: Mapping[tuple[int, str], Fault]
) -> str:
    """Hash of the final model of an in-process run with these faults, in a folder of its own."""
    own = {
        "log-dir": str(folder / "logs"),
        "out": str(folder / "out"),
        "reply-timeout": 0.5,
        "round-deadline": 0.0,
    }
    config = load_run_config({**settings, **own})
    nodes = [
        {"partition-id": index, "num-partitions": len(data), "data-dir": path}
        for index, path in enumerate(data)
    ]
    grid = InProcessGrid(app, nodes, config.values(), faults=faults)
    return weights_hash(Path(run_federation(grid, config, run_id=RUN_ID)["out"]))


def saved(logs: Path, server_round: int) -> Path:
    """State after a round."""
    return logs / STATE_FOLDER / f"round-{server_round}.safetensors"


def has_own_disks() -> bool:
    return subprocess.run([*OWN_NAMESPACE, "true"], capture_output=True).returncode == 0


def finished(job: subprocess.Popen[str]) -> tuple[int, str]:
    """Exit code and messages of a job that has ended."""
    output, errors = job.communicate()
    return job.returncode, output + errors


def train_until(started: Deployment, job: subprocess.Popen[str], index: int, *, runs: int) -> psutil.Process:
    """Wait until a node trains in the first round of its latest run; returns the process of its ClientApp."""
    wait_until(lambda: len(started.client_files(index, "blocks.safetensors")) == runs, process=job)
    process = started.client_app(index)
    assert process is not None
    return process


def kill_in_training(
    started: Deployment, job: subprocess.Popen[str], index: int, *, node: bool = False
) -> Fault:
    """Kill the ClientApp of a node that trains in its first run, and with it its SuperNode; returns what became of it.

    A busy machine may let the training end first: the client has its residual then.
    """
    process = train_until(started, job, index, runs=1)
    if node:
        started.nodes[index].kill()
        started.nodes[index].wait()
    with suppress(psutil.NoSuchProcess):
        process.kill()
        while process.status() != psutil.STATUS_ZOMBIE:
            time.sleep(POLL_SECONDS)
    return on_the_way if started.client_files(index, "residual-1.safetensors") else MISSING


@pytest.mark.skipif(not has_own_disks(), reason="this user may not mount a disk in a namespace of its own")
def test_nodes_that_cannot_take_part_are_named_and_the_rest_trains(tmp_path, graph, tiny_tokenizer):
    """No data, another base, a full disk; and the copy of the model is damaged on a node that takes part."""
    other = save_tiny_graph(tmp_path / "other", tiny_tokenizer, num_experts=4, visits=3)
    (tmp_path / "nothing").mkdir()
    data = [data_of(tmp_path, index) for index in range(5)]
    nodes = [
        Node({"data-dir": data[0]}),
        Node({"data-dir": data[1]}),
        Node({"data-dir": str(tmp_path / "nothing")}),
        Node({"data-dir": data[3], "graph": str(other)}),
        Node({"data-dir": data[4]}, disk_bytes=16_384),
    ]
    settings, logs = settings_in(tmp_path / "run", graph, num_clients=5, num_rounds=2), tmp_path / "run/logs"
    with deployment(tmp_path / "flower", nodes) as started:
        job = submit(started, settings)
        wait_until(saved(logs, 2).exists, process=job)
        (copy,) = started.client_files(0, "global.safetensors")
        copy.write_bytes(copy.read_bytes()[:-5] + b"wrong")
        code, said = finished(job)
    said = " ".join(said.split())
    assert code == 1 and "expected a usable update of every client, got none of node-" in said
    for reason in (
        "doesn't contain any data files",
        "expected the same bootstrapped checkpoint",
        "expected free disk space",
    ):
        assert "no update of node-" in said and reason in said
    assert [fates(logs, index) for index in range(5)] == [{1: None, 2: None}] * 2 + [{}] * 3
    summary = json.loads((logs / "summary.json").read_text())
    # The node with the damaged copy starts from the checkpoint again.
    assert [client["graph_hash"] for client in summary["clients"][:2]] == [summary["graph_hash"]] * 2
    missing = {(index, str(number)): MISSING for index in (2, 3, 4) for number in (1, 2, 3)}
    assert weights_hash(tmp_path / "run/out") == expected_hash(settings, tmp_path / "expected", data, missing)


def test_killed_and_slow_clients_are_missing_in_their_round_alone(tmp_path, graph):
    """Two jobs in turn on the same daemons: a ClientApp and a SuperNode are killed, then a ClientApp stands still.

    Flower reports the deaths after about a minute.
    """
    data = [data_of(tmp_path, index) for index in range(3)]
    first = settings_in(tmp_path / "first", graph, num_clients=3, num_rounds=2, local_steps=100)
    second = settings_in(tmp_path / "second", graph, num_clients=3, local_steps=100, round_deadline=45.0)
    with deployment(tmp_path / "flower", [Node({"data-dir": path}) for path in data]) as started:
        job = submit(started, first)
        with ThreadPoolExecutor(2) as pool:  # whichever trains first
            of_client = pool.submit(kill_in_training, started, job, 1)
            of_node = pool.submit(kill_in_training, started, job, 2, node=True)
        killed = {(1, 1): of_client.result(), (2, 1): of_node.result()}
        started.nodes[2] = started.start_node(2)  # without a key: a new node for the SuperLink
        assert finished(job)[0] == 0  # its former self is no client that was not used
        job = submit(started, second)
        slow = train_until(started, job, 0, runs=2)
        slow.suspend()
        wait_until(saved(tmp_path / "second/logs", 1).exists, process=job)
        slow.resume()
        assert finished(job)[0] == 0
    for name, settings, dead, late in (("first", first, killed, []), ("second", second, {}, [(0, 1)])):
        seen = [fates(tmp_path / name / "logs", index) for index in range(3)]
        used = {
            (index, number) for index, found in enumerate(seen) for number, why in found.items() if not why
        }
        every = {(index, number) for index in range(3) for number in range(1, settings["num-rounds"] + 1)}
        faults = {
            (index, str(number)): dead.get((index, number), on_the_way) for index, number in every - used
        }
        assert used.isdisjoint({*dead, *late}) and len(used) >= len(every) - 3
        assert weights_hash(tmp_path / name / "out") == expected_hash(
            settings, tmp_path / f"expected-{name}", data, faults
        )


def test_a_superlink_that_starts_again_goes_on_with_the_run(tmp_path, graph):
    """With a database, and an executor of its own for the ServerApp, which waits for the SuperLink."""
    data = [data_of(tmp_path, index) for index in range(2)]
    settings = settings_in(tmp_path / "run", graph)
    logs = tmp_path / "run/logs"
    with deployment(
        tmp_path / "flower", [Node({"data-dir": path}) for path in data], executor=True
    ) as started:
        job = submit(started, settings)
        wait_until(saved(logs, 1).exists, process=job)
        started.link.kill()
        started.link.wait()
        time.sleep(3)
        started.start_link()
        code, said = finished(job)
        assert code == 0, said
    assert [fates(logs, index) for index in range(2)] == [{1: None, 2: None, 3: None}] * 2
    assert weights_hash(tmp_path / "run/out") == expected_hash(settings, tmp_path / "expected", data, {})
