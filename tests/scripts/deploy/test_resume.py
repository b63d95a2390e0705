"""A run on a real SuperLink and two real SuperNodes that loses its ServerApp, then the SuperLink, and is continued."""

from __future__ import annotations

import json
import subprocess
import time
from pathlib import Path

from benchmarks.support.flower.deployment import (
    Deployment,
    deployment,
    kill_server_app,
    wait_for_end_of_server_app,
    wait_until,
)
from benchmarks.support.resume.killed_run import weights_hash
from configs.schema import load_run_config
from server.app import run_federation
from server.flower.flower_process import job_processes
from server.flower.in_process_grid import RUN_ID
from server.state.journal import STATE_FOLDER
from tests.support.tiny_federation import TinyGrid, run_values, save_tiny_graph


def settings_in(folder: Path, graph: Path) -> dict:
    own = {"num_rounds": 3, "local_steps": 1, "expert_budget": 3, "reply_timeout": 120.0, "trace_tokens": 0}
    return run_values(graph, folder, **own, out=str(folder / "out"))


def undisturbed_hash(settings: dict) -> str:
    """Hash of the final model of a run without any fault, over the in-process grid."""
    config = load_run_config(settings)
    return weights_hash(Path(run_federation(TinyGrid(config), config, run_id=RUN_ID)["out"]))


def wait_for_round(server_round: int, logs: Path, job: subprocess.Popen[str]) -> None:
    """Wait until the requests of a round are with the nodes."""
    saved = logs / STATE_FOLDER / f"round-{server_round - 1}.safetensors"
    wait_until(saved.exists, process=job)
    time.sleep(0.5)


def assert_killed(job: subprocess.Popen[str], server_round: int, folder: Path) -> None:
    """The job has failed before the end of a round, without a final model."""
    output, errors = job.communicate()
    assert (job.returncode, output) == (1, "") and errors.splitlines()[-1].startswith("fedgraft: error: ")
    saved = folder / "logs" / STATE_FOLDER / f"round-{server_round}.safetensors"
    assert not saved.exists() and not (folder / "out").exists()


def continue_run(started: Deployment, logs: Path) -> subprocess.Popen[str]:
    return started.fedgraft("resume", str(logs))


def test_a_killed_server_app_and_a_killed_superlink_leave_the_model_of_an_undisturbed_run(
    tmp_path, tiny_tokenizer
):
    graph = save_tiny_graph(tmp_path / "graph", tiny_tokenizer, num_experts=4, visits=2)
    settings, logs = settings_in(tmp_path / "run", graph), tmp_path / "run" / "logs"
    with deployment(tmp_path / "flower") as started:
        job = started.fedgraft(
            "submit", *(f"--set={key}={json.dumps(value)}" for key, value in settings.items())
        )
        wait_for_round(2, logs, job)
        kill_server_app(logs)
        assert_killed(job, 2, tmp_path / "run")
        job = continue_run(started, logs)
        wait_for_round(3, logs, job)
        started.link.kill()
        started.restart()  # without a database, so that it does not know the run
        _, errors = job.communicate()
        assert job.returncode == 1 and errors.splitlines()[-1].startswith("fedgraft: error: "), errors
        wait_for_end_of_server_app(logs)
        job = continue_run(started, logs)
        output, errors = job.communicate()
        assert (job.returncode, "round 3/3" in errors, "graph edits" in output) == (0, True, True), errors
    assert job_processes(started.job) == []
    summary = json.loads((logs / "summary.json").read_text())
    assert (summary["rounds"], summary["stopped"]) == (3, None)
    expected = undisturbed_hash(settings_in(tmp_path / "undisturbed", graph))
    assert weights_hash(tmp_path / "run" / "out") == expected
