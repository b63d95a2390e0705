"""Questions to Flower's command line and its answers; Flower is not started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from server.flower.flower_cli import (
    end_at_once,
    known_nodes,
    known_runs,
    register_node,
    run_log,
    run_status,
    submit,
)
from server.flower.flower_process import RunFailed

ANSWER = {
    "success": True,
    "runs": [
        {"run-id": "17", "status": "running", "status-details": "N/A"},
        {"run-id": "16", "status": "finished:failed", "status-details": "lost"},
    ],
}


def test_submit_passes_everything_on_and_returns_the_run_id(tmp_path, fake_flwr):
    options = fake_flwr(
        f"""printf '%s\\n' "$@" > {tmp_path}/args; echo 'noise {{"success": true, "run-id": "17"}}'"""
    )
    federation = {"num-supernodes": 2, "client-resources-num-cpus": 1}
    assert submit(Path("/app"), config_file=Path("/c.toml"), federation_config=federation, **options) == "17"
    assert (tmp_path / "args").read_text().splitlines() == [
        *("run", "/app", "local", "--format", "json", "--run-config", "/c.toml"),
        *("--federation-config", "num-supernodes=2 client-resources-num-cpus=1"),
    ]


def test_a_refused_submission_is_an_error_in_one_line(fake_flwr):
    answer = {"success": False, "error-message": "Using x\n\n[code: 15] Invalid run configuration."}
    options = fake_flwr(f"cat <<'END'\n{json.dumps(answer)}\nEND\nexit 1")
    with pytest.raises(RunFailed, match=r"^`flwr run` failed: \[code: 15\] Invalid run configuration\.$"):
        submit(Path("/app"), config_file=Path("/c.toml"), **options)


def test_a_flwr_command_without_output_is_an_error(fake_flwr):
    with pytest.raises(RunFailed, match="`flwr ls` failed: no answer"):
        run_status("17", **fake_flwr("exit 1"))


def test_a_run_has_a_status(fake_flwr):
    options = fake_flwr(f"cat <<'END'\n{json.dumps(ANSWER)}\nEND")
    status = run_status("17", **options)
    assert (status.state, status.details, status.finished) == ("running", "N/A", False)
    assert known_runs(**options) == {"17": "running", "16": "finished:failed"}


def test_nodes_have_a_status(fake_flwr):
    nodes = {
        "success": True,
        "nodes": [{"node-id": "5", "status": "online"}, {"node-id": 6, "status": "offline"}],
    }
    assert known_nodes(**fake_flwr(f"echo '{json.dumps(nodes)}'")) == {"5": "online", "6": "offline"}


def test_a_run_is_ended_and_its_log_is_read(tmp_path, fake_flwr):
    script = f"""echo "$@" >> {tmp_path}/args; echo '{{"success": true}}'"""
    options = fake_flwr(script)
    end_at_once("17", **options)
    assert run_log("17", **options) == '{"success": true}\n'
    assert (tmp_path / "args").read_text().splitlines() == [
        "stop 17 local --format json",
        "log 17 local --show",
    ]


def test_a_public_key_is_registered_once(tmp_path, fake_flwr):
    options = fake_flwr("""echo '{"success": true, "node-id": 5}'""")
    assert register_node(tmp_path / "site.pub", **options)
    answer = {"success": False, "error-message": "[code: 23] Public key already in use"}
    assert not register_node(tmp_path / "site.pub", **fake_flwr(f"echo '{json.dumps(answer)}'; exit 1"))
    answer["error-message"] = "[code: 22] Public key not valid"
    with pytest.raises(RunFailed, match="not valid"):
        register_node(tmp_path / "site.pub", **fake_flwr(f"echo '{json.dumps(answer)}'; exit 1"))
