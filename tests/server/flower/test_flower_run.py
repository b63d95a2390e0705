"""Cause of a failed run from Flower's answers, logs and failure.json; content of the bundle. Flower is not started."""

from __future__ import annotations

import io
import threading
import time
import zipfile

import pytest
from flwr.cli.build import build_fab_from_disk

from configs.errors import Interrupted, UserError
from server.flower.flower_cli import RunStatus
from server.flower.flower_process import RunFailed
from server.flower.flower_run import (
    empty_folder,
    raise_for_status,
    root_cause,
    run_and_wait,
    stage_app,
)
from server.state.run_lock import SERVER_LOCK, holding
from server.state.stop_request import stop_requested
from tests.support.flower.apps import write_throwaway_app
from tests.support.paths import ROOT

COMPLETED = '{"success": true, "runs": [{"status": "finished:completed", "status-details": "N/A"}]}'
RUNNING = COMPLETED.replace("finished:completed", "running")

SIMULATION_LOG = """\
INFO :      Starting Flower Simulation
ValueError: printed, not raised
\x1b[91mERROR \x1b[0m:     Simulation raised an exception
Traceback (most recent call last):
  File "/home/apps/server/app.py", line 22, in main
    raise UserError(text)
configs.errors.UserError: expected a folder at /graph, got nothing; run fedgraft bootstrap

The above exception was the direct cause of the following exception:

Traceback (most recent call last):
  File "/flwr/simulation/run_simulation.py", line 347, in _main_loop
    raise RuntimeError("An error was encountered. Ending simulation.") from ex
RuntimeError: An error was encountered. Ending simulation.
\x1b[91mERROR \x1b[0m:     Exit Code: 700
"""


def test_root_cause_is_the_exception_below_flowers_wrapper():
    message = "expected a folder at /graph, got nothing; run fedgraft bootstrap"
    assert root_cause(SIMULATION_LOG) == ("configs.errors.UserError", message)


@pytest.mark.parametrize(
    ("log", "cause"),
    [
        ("", ("", "")),
        ("KeyError: 'never raised'\n", ("", "")),
        (
            "Traceback (most recent call last):\n  File x\nKeyboardInterrupt\nmore: text\n",
            ("KeyboardInterrupt", ""),
        ),
        (
            "Traceback (most recent call last):\n F\na.B: one\nTraceback (most recent call last):\n F\nC: two\nthree\n",
            ("C", "two"),
        ),
    ],
)
def test_root_cause_of_other_logs(log, cause):
    assert root_cause(log) == cause


def test_status_decides_and_the_log_explains(tmp_path):
    log = tmp_path / "flower.log"
    log.write_text(SIMULATION_LOG)
    raise_for_status(RunStatus("finished:completed", ""), log)
    with pytest.raises(UserError, match="^expected a folder at /graph, got nothing; run fedgraft bootstrap$"):
        raise_for_status(RunStatus("finished:failed", ""), log)
    log.write_text(SIMULATION_LOG.replace("UserError", "DiskError"))
    with pytest.raises(RunFailed, match="finished:failed: configs.errors.DiskError: expected a folder"):
        raise_for_status(RunStatus("finished:failed", ""), log)
    log.write_text("")
    with pytest.raises(RunFailed, match="finished:stopped: by the user"):
        raise_for_status(RunStatus("finished:stopped", "by the user"), log)


def test_a_recorded_failure_is_preferred_to_the_log(tmp_path):
    log, failed = tmp_path / "flower.log", RunStatus("finished:failed", "")
    log.write_text(SIMULATION_LOG)
    with pytest.raises(RunFailed, match="finished:failed: DiskError: disk full"):
        raise_for_status(failed, log, failure=("DiskError", "disk full"))
    with pytest.raises(UserError, match="^recorded$"):
        raise_for_status(failed, log, failure=("UserError", "recorded"))
    raise_for_status(RunStatus("finished:completed", ""), log, failure=("UserError", "recorded"))


@pytest.mark.parametrize("recorded", [True, False])
def test_a_failed_run_reads_failure_json_of_its_log_directory(tmp_path, fake_flwr, recorded):
    (tmp_path / "failure.json").write_text('{"type": "UserError", "message": "of an earlier run"}')
    record = """echo '{"type": "UserError", "message": "of this run"}' > failure.json"""
    failed = COMPLETED.replace("completed", "failed")
    script = f"""
case $1 in
run) cd {tmp_path}; {record if recorded else ':'}; echo '{{"success": true, "run-id": "17"}}' ;;
log) printf 'Traceback (most recent call last):\\n F\\nKeyError: in the log\\n' ;;
ls) echo '{failed}' ;;
esac"""
    options = {"scratch": tmp_path, "log_file": tmp_path / "flower.log", "timeout": 30}
    app = write_throwaway_app(tmp_path / "project")
    kind, message = (UserError, "^of this run$") if recorded else (RunFailed, "KeyError: in the log")
    with pytest.raises(kind, match=message):
        run_and_wait(app, run_config={"log-dir": str(tmp_path)}, env=fake_flwr(script)["env"], **options)


def test_an_interrupt_requests_the_end_of_the_run_and_waits_for_its_server(tmp_path, fake_flwr, monkeypatch):
    logs, saved, held = tmp_path / "logs", [], threading.Event()

    def serve() -> None:
        """Stands for the ServerApp: it saves its model once it is requested to end."""
        with holding(logs, SERVER_LOCK):
            held.set()
            while not stop_requested(logs):
                time.sleep(0.05)
            time.sleep(0.3)
            saved.append(True)

    def interrupted(*_, **__):
        server.start()
        held.wait()
        raise KeyboardInterrupt

    server = threading.Thread(target=serve)
    monkeypatch.setattr("server.flower.flower_run.wait_for_run", interrupted)
    env = fake_flwr("""echo '{"success": true, "run-id": "17"}'""")["env"]
    app = write_throwaway_app(tmp_path / "project")
    options = {"env": env, "scratch": tmp_path, "log_file": tmp_path / "log", "timeout": 30}
    with pytest.raises(KeyboardInterrupt):
        run_and_wait(app, run_config={"log-dir": str(logs)}, **options)
    assert saved == [True]
    server.join()


def test_a_run_that_was_requested_to_end_says_what_it_saved(tmp_path, fake_flwr):
    record = """{"type": "StopRequested", "message": "interrupted"}"""
    failed = COMPLETED.replace("completed", "failed")
    script = f"""
case $1 in
run) echo '{record}' > {tmp_path}/failure.json; echo '{{"success": true, "run-id": "17"}}' ;;
ls) echo '{failed}' ;;
esac"""
    (tmp_path / "summary.json").write_text('{"rounds": 2, "out": "/out"}')
    options = {"scratch": tmp_path, "log_file": tmp_path / "flower.log", "timeout": 30}
    app, env = write_throwaway_app(tmp_path / "project"), fake_flwr(script)["env"]
    with pytest.raises(Interrupted, match="^interrupted; the model after round 2 is in /out$"):
        run_and_wait(app, run_config={"log-dir": str(tmp_path)}, env=env, **options)


def test_a_log_directory_in_use_is_refused_before_its_failure_is_cleared(tmp_path):
    (tmp_path / "failure.json").touch()
    options = {"env": {}, "scratch": tmp_path / "scratch", "log_file": tmp_path / "log", "timeout": 1}
    with holding(tmp_path, SERVER_LOCK), pytest.raises(UserError, match="in use by process"):
        run_and_wait(tmp_path, run_config={"log-dir": str(tmp_path)}, **options)
    assert (tmp_path / "failure.json").exists() and not (tmp_path / "scratch").exists()


def test_staging_leaves_out_what_no_bundle_holds_and_bundles_the_same(tmp_path):
    app = write_throwaway_app(tmp_path / "app")
    (app / ".gitignore").write_text("secret.py\n")
    for name in (".venv/lib/a.py", "__pycache__/b.py", "weights.safetensors", "sub/c.py", "secret.py"):
        (app / name).parent.mkdir(parents=True, exist_ok=True)
        (app / name).write_text("x = 1\n")
    staged = stage_app(app, tmp_path / "staged")
    files = {path.relative_to(staged).as_posix() for path in staged.rglob("*") if path.is_file()}
    assert files == {".gitignore", "pyproject.toml", "throwaway.py", "sub/c.py", "secret.py"}
    assert build_fab_from_disk(staged) == build_fab_from_disk(app)


def test_our_own_bundle_is_small_and_whole(tmp_path):
    bundle = build_fab_from_disk(stage_app(ROOT, tmp_path / "fedgraft"))
    names = set(zipfile.ZipFile(io.BytesIO(bundle)).namelist())
    needed = [ROOT.glob("configs/**/*.toml"), ROOT.glob("configs/**/*.json")]
    needed += [
        ROOT.glob(f"{folder}/**/*.py")
        for folder in ("clients", "configs", "experts", "federated", "models", "server")
    ]
    expected = {path.relative_to(ROOT).as_posix() for paths in needed for path in paths}
    assert names == expected | {"pyproject.toml", ".info/CONTENT"}
    assert len(bundle) < 2_000_000


def test_empty_folder_is_made_once_and_stays_empty(tmp_path):
    assert empty_folder(tmp_path) == empty_folder(tmp_path)
    assert list(empty_folder(tmp_path).iterdir()) == []
