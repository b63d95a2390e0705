"""The commands of `docs/deployment.md`, executed as they stand: three sites with TLS and authentication; refusals."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

import pytest

from benchmarks.support.flower.deployment import wait_until
from models.checkpoints.load import load_graph
from models.graph.graph_state import read_graph
from server.flower.flower_process import JOB_VARIABLE, free_ports, stop_job
from server.flower.guard import guarded
from tests.support.paths import ROOT
from tests.support.tiny_federation import save_tiny_graph, write_texts

PAGE = (ROOT / "docs/deployment.md").read_text(encoding="utf-8")
SITES = 3
REFUSED = "error: it ended at once: "


def blocks() -> list[list[str]]:
    """Command lines of the page's shell blocks; the first block sets variables."""
    return [block.strip().splitlines() for block in re.findall(r"^```bash\n(.*?)^```", PAGE, re.S | re.M)]


def test_the_page_has_ten_commands_for_three_sites():
    _, *commands = blocks()
    assert sum(len(block) for block in commands) == 10
    assert PAGE.count("$INDEX") >= 4 and f"--clients {SITES}" in PAGE


class Place(NamedTuple):
    """A folder in which commands are executed, and what they printed."""

    folder: Path
    environment: dict[str, str]
    output: dict[str, subprocess.CompletedProcess[str]]

    def shell(self, line: str, **variables: str) -> subprocess.CompletedProcess[str]:
        """Execute a command line of the page, in a folder with the scripts."""
        environment = self.environment | variables
        return subprocess.run(
            ["bash", "-c", line],
            cwd=self.folder,
            env=environment,
            capture_output=True,
            text=True,
            timeout=900,
        )

    def execute(self, line: str, **variables: str) -> None:
        """Execute a command line, which must succeed."""
        result = self.output[line] = self.shell(line, **variables)
        assert result.returncode == 0, f"{line}\n{result.stdout}\n{result.stderr}"


@pytest.fixture(scope="module")
def place(tmp_path_factory, tiny_tokenizer) -> Iterator[Place]:
    """The page's commands have been executed; everything that they started is ended afterwards."""
    folder = tmp_path_factory.mktemp("secure")
    home = folder / "federation"
    save_tiny_graph(home / "graph", tiny_tokenizer, visits=2)
    for index, name in enumerate(("letters", "digits", "letters")):
        write_texts(home / "data" / str(index), [name])
    (folder / "scripts").symlink_to(ROOT / "scripts")
    command = folder / "bin" / "fedgraft"  # of this checkout, whichever is installed
    command.parent.mkdir()
    command.write_text(f'#!/bin/sh\nexec {sys.executable} {ROOT}/fedgraft.py "$@"\n')
    command.chmod(0o755)
    job = f"secure-{os.getpid()}"
    (port,) = free_ports(1)
    settings, *steps = blocks()
    names = dict(line.split("#")[0].strip().split("=", 1) for line in settings)
    values = {name: value.replace("$HOME", str(folder)) for name, value in names.items()} | {
        "PORT": str(port)
    }
    environment = os.environ | values
    environment |= {"HOME": str(folder), "FLWR_HOME": str(folder / ".flwr"), "PYTHON": sys.executable}
    environment |= {"PATH": f"{command.parent}:{os.environ['PATH']}", JOB_VARIABLE: job}
    (folder / "tmp").mkdir()
    environment |= {"TMPDIR": str(folder / "tmp")}
    environment |= {"FLWR_SUPEREXEC_TASK_POLL_INTERVAL": "0.05"}
    opened = Place(folder, environment, {})
    with guarded(job, folder / "none"):
        try:
            for block in steps:
                for line in block:
                    for index in range(SITES) if "$INDEX" in line else (0,):
                        opened.execute(line, INDEX=str(index))
            yield opened
        finally:
            stop_job(job)


def test_the_federation_trains_and_its_model_is_here(place):
    logs = place.folder / "logs" / "lab"
    summary = json.loads((logs / "summary.json").read_text())
    assert [client["name"] for client in summary["clients"]] == ["client-0", "client-1", "client-2"]
    assert all(client["refused"] is None for client in summary["clients"])
    assert read_graph(load_graph(str(place.folder / "trained"))).digest() == summary["graph_hash"]
    (status,) = (each for line, each in place.output.items() if line == "fedgraft status logs/lab")
    assert "finished:completed, round 1 of 1" in status.stdout
    (nodes,) = (each for line, each in place.output.items() if line == "fedgraft status --connection lab")
    assert nodes.stdout.count("online") == SITES


def test_private_keys_are_their_owners_alone_and_secrets_are_not_in_logs(place):
    keys = place.folder / "federation" / "keys"
    private = [keys / name for name in ("ca.key", "server.key", "site-0", "site-1", "site-2")]
    assert {path.stat().st_mode & 0o777 for path in private} == {0o600}
    secrets = [line for path in private for line in path.read_text().splitlines() if not line.startswith("-")]
    logs = [path for path in place.folder.rglob("*") if path.is_file() and not path.is_relative_to(keys)]
    text = "\n".join(path.read_bytes().decode(errors="replace") for path in logs)
    text += "".join(result.stdout + result.stderr for result in place.output.values())
    assert len(secrets) > 15 and len(logs) > 30
    assert [secret for secret in secrets if secret in text] == []


def test_commands_change_nothing_a_second_time(place):
    _, *steps = blocks()
    for line in (line for block in steps for line in block if "scripts/" in line):
        result = place.shell(line, INDEX="0")
        assert result.returncode == 0, result.stderr
        assert re.search("kept|already running|lab is", result.stdout), (line, result.stdout)


SMALL = "--set block-size=32 --set local-steps=2 --set trace-tokens=0 --clients 3"


def test_a_detached_run_elsewhere_is_shown_followed_and_fetched(place):
    """The folder of the SuperLink's machine is another one here: rounds come through the log, results by a copy."""
    logs, there = place.folder / "logs" / "away", place.folder / "srv" / "run"
    submit = (
        f'fedgraft submit --connection lab --graph "$GRAPH" --rounds 1 {SMALL} --log-dir logs/away --out away'
    )
    place.execute(f"{submit} --server-folder {there} --detach")
    assert "round 0 of 1" in place.shell("fedgraft status logs/away").stdout
    place.execute("fedgraft resume logs/away --json")
    summary = json.loads(place.output["fedgraft resume logs/away --json"].stdout)
    assert summary["out"] == str(place.folder / "away") and summary["log_dir"] == str(logs)
    assert read_graph(load_graph(summary["out"])).digest() == summary["graph_hash"]
    assert (logs / "rounds.jsonl").read_text() == (there / "logs" / "rounds.jsonl").read_text()
    assert (there / "logs" / "state").is_dir() and not (logs / "state").exists()
    assert "fedgraft-record summary.json" in (logs / "flower.log").read_text()


def test_a_run_outlasts_its_terminal_and_is_stopped_with_its_model(place):
    submit = f'fedgraft submit --connection lab --graph "$GRAPH" --rounds 500 {SMALL} --log-dir logs/long --out long'
    command = ["bash", "-c", f"exec {submit}"]
    follower = subprocess.Popen(
        command,
        cwd=place.folder,
        env=place.environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
        # A suite started by ``nohup`` passes on that the signal is ignored.
        preexec_fn=lambda: signal.signal(signal.SIGHUP, signal.SIG_DFL),
    )
    rounds = place.folder / "logs" / "long" / "rounds.jsonl"
    wait_until(lambda: rounds.exists() and rounds.read_text().count("\n") > 0, process=follower)
    follower.send_signal(signal.SIGHUP)
    _, errors = follower.communicate(timeout=300)
    assert follower.returncode == 130 and "goes on: `fedgraft resume" in errors
    assert ": running, round" in place.shell("fedgraft status logs/long").stdout
    place.execute("fedgraft stop logs/long")
    summary = json.loads((place.folder / "logs" / "long" / "summary.json").read_text())
    assert (summary["stopped"], summary["out"]) == ("interrupted", str(place.folder / "long"))
    assert read_graph(load_graph(summary["out"])).digest() == summary["graph_hash"]


def node(place: Place, *options: str) -> subprocess.CompletedProcess[str]:
    """Another SuperNode, which reports a refusal by the SuperLink and ends."""
    command = (
        'scripts/deploy/supernode.sh --superlink "$HUB:$PORT" --detach --state "$STATE/other" partition-id=3 '
    )
    return place.shell(command + " ".join(options))


def test_unregistered_keyless_and_duplicate_supernodes_are_refused(place):
    place.execute('scripts/deploy/certificates.sh node "$KEYS/other" stranger')
    roots = '--root-certificates "$KEYS/ca.crt"'
    for key in ("", '--key "$KEYS/other/stranger"', '--key "$KEYS/site-0"'):
        result = node(place, roots, key)
        assert result.returncode == 1, (key, result)
        assert REFUSED in result.stderr, (key, result.stderr)


def test_other_certificates_and_plain_connections_are_refused(place):
    place.execute('scripts/deploy/certificates.sh authority "$KEYS/false"')
    status = "fedgraft status --superlink $HUB:$PORT "
    for options, message in (
        ("--insecure", "name its --root-certificates"),
        ('--root-certificates "$KEYS/false/ca.crt"', "vouch for, got one that fails"),
    ):
        result = place.shell(status + options)
        assert (result.returncode, result.stdout) == (2, "")
        assert message in result.stderr and len(result.stderr.splitlines()) == 1


def test_a_killed_supernode_comes_back_with_its_key_as_the_same_node(place):
    """Flower refuses the key until the session of the killed process has expired."""
    nodes = "fedgraft status --connection lab --json"
    before = json.loads(place.shell(nodes).stdout)["nodes"]
    os.kill(int((place.folder / "federation/state/site-1/pid").read_text()), signal.SIGKILL)
    start = next(line for block in blocks() for line in block if "supernode.sh" in line)
    results = []
    deadline = time.monotonic() + 120
    while not results or (results[-1].returncode and time.monotonic() < deadline):
        results.append(place.shell(start, INDEX="1"))
    assert results[-1].returncode == 0
    assert all(result.returncode == 1 and REFUSED in result.stderr for result in results[:-1])
    after = json.loads(place.shell(nodes).stdout)["nodes"]
    assert set(after) == set(before) and list(after.values()).count("online") == SITES


def test_services_end_by_their_state_folder(place):
    stop = 'scripts/deploy/supernode.sh --stop --state "$STATE/site-2"'
    assert "ended process" in place.shell(stop).stdout
    assert "nothing runs" in place.shell(stop).stdout


def test_a_superlink_that_starts_again_knows_its_nodes_and_runs(place):
    before = place.shell("fedgraft status --connection lab --json").stdout
    place.execute('scripts/deploy/superlink.sh --stop --state "$STATE/superlink"')
    start = next(line for block in blocks() for line in block if "superlink.sh" in line)
    place.execute(start)
    after = json.loads(place.shell("fedgraft status --connection lab --json").stdout)
    assert after["runs"] == json.loads(before)["runs"] and len(after["runs"]) == 3
    assert set(after["nodes"]) == set(json.loads(before)["nodes"])


def test_nothing_is_written_outside_of_the_folders_that_were_named(place):
    """Caches of libraries in the home folder apart, and Flower's own folder in it."""
    named = {"federation", "logs", "trained", "away", "long", "srv", "bin", "scripts", "tmp"}
    assert {path.name for path in place.folder.iterdir()} - {".cache", ".config", ".flwr"} == named
    assert [path.name for path in (place.folder / "tmp").iterdir() if "fedgraft" in path.name] == []
