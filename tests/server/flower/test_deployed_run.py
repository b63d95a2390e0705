"""Runs on a SuperLink that outlast the command; a shell script stands for Flower's command line."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.errors import UserError
from configs.schema import RunConfig
from server.flower.connection import Connection
from server.flower.deployed_run import (
    current_status,
    fetch_results,
    flower_commands,
    follow_run,
    known_status,
    stop_run,
    submit_run,
)
from server.flower.flower_process import RunFailed
from server.flower.submission import Submission, read_submission
from server.reporting.run_log import read_rounds
from server.state.run_lock import SERVER_LOCK, holding
from server.state.stop_request import stop_requested
from tests.support.flower.apps import write_throwaway_app

LINK = Connection("127.0.0.1:4711", insecure=True)
ELSEWHERE = Connection("lab.example.org:4711", insecure=True)
ROW = {"round": 1, "perplexity": 9.0, "bytes_up": 1, "bytes_down": 2}


def answer(state: str) -> str:
    return json.dumps({"success": True, "runs": [{"run-id": "17", "status": state, "status-details": "d"}]})


@pytest.fixture
def flwr(tmp_path, fake_flwr, monkeypatch):
    """Function that installs a shell script as ``flwr``, for a SuperLink that answers."""

    def install(script: str) -> None:
        env = fake_flwr(script)["env"]
        monkeypatch.setattr(
            "server.flower.deployed_run.flower_environment", lambda home, job: env | {"FLWR_HOME": str(home)}
        )

    monkeypatch.setattr("server.flower.deployed_run.wait_until_healthy", lambda connection, timeout: None)
    return install


def a_run(folder: Path, **changes: object) -> RunConfig:
    return RunConfig(log_dir=str(folder / "logs"), out=str(folder / "out"), **changes)


def test_a_run_is_submitted_and_recorded(tmp_path, flwr):
    flwr(f"""cp "$7" {tmp_path}/config; cp $FLWR_HOME/config.toml {tmp_path}/link
echo '{{"success": true, "run-id": "17"}}'""")
    logs, app = tmp_path / "logs", write_throwaway_app(tmp_path / "app")
    logs.mkdir()
    for name in ("rounds.jsonl", "summary.json", "failure.json", "stop"):
        (logs / name).write_text("of an earlier run")
    run = a_run(tmp_path)
    submission = submit_run(app, run, connection=LINK)
    assert submission == Submission("17", LINK, dict(run.values()), run.out) == read_submission(logs)
    assert [path.name for path in logs.iterdir()] == ["submission.json"]
    assert f'log-dir = "{logs}"' in (tmp_path / "config").read_text()
    assert 'address = "127.0.0.1:4711"' in (tmp_path / "link").read_text()


def test_a_run_elsewhere_has_folders_of_that_machine(tmp_path, flwr):
    flwr("""echo '{"success": true, "run-id": "17"}'""")
    app = write_throwaway_app(tmp_path / "app")
    with pytest.raises(UserError, match="expected `server_folder` for the SuperLink at lab.example.org"):
        submit_run(app, a_run(tmp_path), connection=ELSEWHERE)
    submission = submit_run(app, a_run(tmp_path), connection=ELSEWHERE, server_folder="lab:/srv/run")
    assert (submission.values["log-dir"], submission.values["out"]) == ("/srv/run/logs", "/srv/run/model")
    assert (submission.out, submission.server_folder) == (str(tmp_path / "out"), "lab:/srv/run")


def test_a_log_directory_in_use_is_refused_and_kept(tmp_path, flwr):
    flwr("exit 1")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "summary.json").touch()
    with holding(tmp_path / "logs", SERVER_LOCK), pytest.raises(UserError, match="in use by process"):
        submit_run(tmp_path, a_run(tmp_path), connection=LINK)
    assert (tmp_path / "logs" / "summary.json").exists()


def test_a_continued_run_keeps_its_records(tmp_path, flwr):
    flwr("""echo '{"success": true, "run-id": "18"}'""")
    (tmp_path / "logs").mkdir()
    (tmp_path / "logs" / "rounds.jsonl").write_text(json.dumps(ROW) + "\n")
    submit_run(write_throwaway_app(tmp_path / "app"), a_run(tmp_path, resume=True), connection=LINK)
    assert read_rounds(tmp_path / "logs") == [ROW]


def finished(folder: Path, state: str) -> str:
    """Script of a run that has ended in a state and printed a round."""
    return f"""
case $1 in
log) echo 'fedgraft-record rounds.jsonl {json.dumps(ROW)}' ;;
ls) echo '{answer(state)}' ;;
esac"""


def test_a_followed_run_leaves_log_and_records_here(tmp_path, flwr):
    flwr(finished(tmp_path, "finished:completed"))
    (tmp_path / "logs").mkdir()
    follow_run(Submission("17", ELSEWHERE, {}, server_folder="lab:/srv"), tmp_path / "logs", timeout=30)
    assert read_rounds(tmp_path / "logs") == [ROW]
    assert "fedgraft-record" in (tmp_path / "logs" / "flower.log").read_text()


def test_a_failed_run_raises(tmp_path, flwr):
    flwr(finished(tmp_path, "finished:failed"))
    (tmp_path / "logs").mkdir()
    with pytest.raises(RunFailed, match="finished:failed: d"):
        follow_run(Submission("17", LINK, {}), tmp_path / "logs")
    assert read_rounds(tmp_path / "logs") == []  # the ServerApp writes them there


def test_the_status_brings_records_up_to_date(tmp_path, flwr):
    flwr(finished(tmp_path, "running"))
    logs = tmp_path / "logs"
    logs.mkdir()
    submission = Submission("17", ELSEWHERE, {}, server_folder="lab:/srv")
    assert current_status(submission, logs).state == "running"
    assert read_rounds(logs) == [ROW]
    assert known_status(submission).details == "d"
    assert known_status(Submission("99", LINK, {})) is None


def test_a_run_is_ended_with_and_without_its_model(tmp_path, flwr, monkeypatch):
    monkeypatch.setattr("server.flower.deployed_run.POLL_SECONDS", 0.01)
    logs = tmp_path / "logs"
    logs.mkdir()
    script = """
case $1 in
stop) touch {0}/ended; echo '{{"success": true}}' ;;
ls) if [ -e {0}/{1} ]; then echo '{2}'; else echo '{3}'; fi ;;
esac"""
    end, on = answer("finished:failed"), answer("running")
    flwr(script.format(tmp_path, "logs/stop", end, on))
    assert stop_run(Submission("17", LINK, {}), logs).state == "finished:failed"
    assert not stop_requested(logs) and not (tmp_path / "ended").exists()
    flwr(script.format(tmp_path, "srv/logs/stop", end, on))
    (tmp_path / "srv" / "logs").mkdir(parents=True)
    stop_run(Submission("17", LINK, {}, server_folder=f"{tmp_path}/srv"), logs)
    assert (tmp_path / "srv" / "logs" / "stop").exists()
    flwr(script.format(tmp_path, "ended", end, on))
    stop_run(Submission("17", LINK, {}), logs, now=True)
    assert (tmp_path / "ended").exists() and not stop_requested(logs)


def test_results_are_fetched_and_the_summary_names_their_folders(tmp_path):
    place, logs, out = tmp_path / "srv", tmp_path / "logs", tmp_path / "out"
    (place / "logs").mkdir(parents=True)
    (place / "model").mkdir()
    (place / "model" / "weights").write_text("w")
    summary = {"rounds": 1, "out": str(place / "model"), "log_dir": str(place / "logs")}
    (place / "logs" / "summary.json").write_text(json.dumps(summary))
    submission = Submission("17", LINK, {"overwrite": False}, str(out), str(place))
    for _ in range(2):  # the second time it replaces its own copy
        fetch_results(submission, logs)
    assert (out / "weights").read_text() == "w"
    assert json.loads((logs / "summary.json").read_text()) == {
        "rounds": 1,
        "out": str(out),
        "log_dir": str(logs),
    }
    with pytest.raises(UserError, match="empty output directory"):
        fetch_results(Submission("18", LINK, {"overwrite": False}, str(out), str(place)), logs)
    fetch_results(Submission("19", LINK, {}), tmp_path / "none")  # nothing to fetch on the same machine
    assert not (tmp_path / "none").exists()


def test_commands_have_a_home_of_their_own(tmp_path, flwr):
    flwr("exit 0")
    with flower_commands(LINK) as commands:
        home = Path(commands.env["FLWR_HOME"])
        assert "127.0.0.1:4711" in (home / "config.toml").read_text()
        assert list(commands.options["cwd"].iterdir()) == []
    assert not home.exists()
