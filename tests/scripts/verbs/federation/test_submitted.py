"""The verbs of a run on a SuperLink: submit, resume, status, stop. Flower is not started."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from configs.schema import RunConfig
from scripts.shared.run_config import PROJECT
from server.flower.connection import Connection
from server.flower.flower_cli import RunStatus
from server.flower.submission import Submission, read_submission
from server.state.journal import STATE_FOLDER
from server.state.run_lock import DRIVER_LOCK, holding
from server.state.settings import Settings
from tests.support.command import assert_refused, run
from tests.support.run_summaries import SUMMARY

LINK = Connection("127.0.0.1:4711", insecure=True)
NAMED = ("--superlink", "127.0.0.1:4711", "--insecure")


@pytest.fixture
def place(tmp_path, monkeypatch) -> Path:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    return tmp_path


@pytest.fixture
def superlink(monkeypatch) -> dict:
    """A SuperLink by its answers: submitted runs, followed runs, and the status of each run id."""
    seen: dict = {"submitted": [], "followed": [], "status": {}}

    def submit_run(project: Path, config: RunConfig, **options) -> Submission:
        assert project == PROJECT
        submission = Submission("17", options["connection"], dict(config.values()), config.out)
        submission.write(Path(config.log_dir))
        seen["submitted"].append((config, options))
        return submission

    def follow_run(submission: Submission, log_dir: Path, **options) -> None:
        (log_dir / "summary.json").write_text(json.dumps(SUMMARY))
        seen["followed"].append((submission.run_id, submission.connection, options))

    def status(submission: Submission, *_) -> RunStatus | None:
        return seen["status"].get(submission.run_id)

    def stop_run(submission: Submission, log_dir: Path, *, now: bool) -> RunStatus:
        return RunStatus(f"stopped, now={now}", "")

    for name, function in {"submit_run": submit_run, "follow_run": follow_run, "stop_run": stop_run}.items():
        monkeypatch.setattr(f"server.flower.deployed_run.{name}", function)
    for name in ("known_status", "current_status"):
        monkeypatch.setattr(f"server.flower.deployed_run.{name}", status)
    return seen


def test_a_submitted_run_is_followed_with_the_options_of_simulate(place, capsys, superlink):
    options = ("--graph", "/srv/graph", "--rounds", "5", "--set", "density=0.25", "--timeout", "9")
    outcome = run(capsys, "submit", *options, *NAMED, "--json")
    assert (outcome.code, outcome.json()) == (0, SUMMARY)
    ((config, given),) = superlink["submitted"]
    assert (config.graph, config.num_rounds, config.density) == ("/srv/graph", 5, 0.25)
    assert config.log_dir == str(place / "logs" / "run")
    assert given == {"connection": LINK, "server_folder": ""}
    assert superlink["followed"] == [("17", LINK, {"timeout": 9.0})]


def test_a_detached_run_is_not_followed(place, capsys, superlink):
    outcome = run(capsys, "submit", "--detach", "--log-dir", "mine", *NAMED, "--json")
    assert outcome.json() == {"run_id": "17", "log_dir": str(place / "mine")}
    assert superlink["followed"] == []


@pytest.mark.parametrize("as_json", [False, True])
def test_bad_input_of_submit_is_one_line(place, capsys, superlink, as_json):
    json_flag = ("--json",) if as_json else ()
    (place / "full").mkdir()
    (place / "full" / "file").touch()
    for arguments, word in (
        (("--set", "densty=1", *NAMED), "did you mean"),
        (("--connection", "lab"), "found no such file; write one"),
        (("--superlink", "lab", "--insecure"), "host:port"),
        (("--out", "full", *NAMED), "empty output directory"),
    ):
        assert_refused(run(capsys, "submit", *arguments, *json_flag), word, as_json=as_json)
    with holding(place / "logs" / "run", DRIVER_LOCK):
        assert_refused(run(capsys, "submit", *NAMED, *json_flag), "in use by", as_json=as_json)
    assert superlink["submitted"] == []


def recorded(place: Path, **values: object) -> Path:
    config = RunConfig(log_dir=str(place / "logs"), num_rounds=3, **values)
    Submission("9", LINK, dict(config.values()), config.out).write(place / "logs")
    return place / "logs"


@pytest.mark.parametrize("state", ["running", "pending", "finished:completed"])
def test_a_run_that_goes_on_or_is_completed_is_followed_again(place, capsys, superlink, state):
    logs = recorded(place)
    superlink["status"]["9"] = RunStatus(state, "")
    outcome = run(capsys, "resume", logs)
    assert outcome.code == 0, outcome
    assert [each[0] for each in superlink["followed"]] == ["9"] and superlink["submitted"] == []
    assert f"run 9 is {state}" in outcome.err


@pytest.mark.parametrize("state", ["finished:failed", "finished:stopped", None])
def test_a_run_that_failed_or_is_unknown_continues_with_its_settings(place, capsys, superlink, state):
    logs = recorded(place)
    Settings(9, "f", RunConfig(density=0.25, log_dir="/elsewhere").values()).write(logs / STATE_FOLDER)
    superlink["status"]["9"] = state and RunStatus(state, "")
    other = Connection("127.0.0.1:1", insecure=True)
    assert run(capsys, "resume", logs, "--superlink", other.address, "--insecure").code == 0
    ((config, given),) = superlink["submitted"]
    assert (config.resume, config.density, config.log_dir) == (True, 0.25, str(logs))
    assert given["connection"] == other
    assert superlink["followed"] == [("17", other, {"timeout": None})]


def test_a_run_of_simulate_continues_on_a_superlink(place, capsys, superlink):
    Settings(9, "f", RunConfig(density=0.25).values()).write(place / "logs" / STATE_FOLDER)
    assert run(capsys, "resume", "logs", *NAMED).code == 0
    assert superlink["submitted"][0][0].density == 0.25
    assert_refused(run(capsys, "resume", "nothing", *NAMED), "expected the state of a run", as_json=False)


def test_a_run_elsewhere_continues_with_the_recorded_settings(place, capsys, superlink):
    values = RunConfig(density=0.25, log_dir="/srv/logs", out="/srv/model").values()
    Submission("9", LINK, dict(values), str(place / "out"), "lab:/srv").write(place / "logs")
    assert run(capsys, "resume", "logs").code == 0
    ((config, given),) = superlink["submitted"]
    assert (config.resume, config.density, config.out) == (True, 0.25, str(place / "out"))
    assert (config.log_dir, given["server_folder"]) == (str(place / "logs"), "lab:/srv")


def test_the_status_of_a_run_shows_its_progress(place, capsys, superlink):
    logs = recorded(place)
    rows = [{"round": 1, "perplexity": 9.0, "bytes_up": 1, "bytes_down": 2}] * 2
    (logs / "rounds.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    superlink["status"]["9"] = RunStatus("running", "N/A")
    assert run(capsys, "status", logs, "--json").json() == {
        "run_id": "9", "state": "running", "details": "N/A", "rounds": 1, "num_rounds": 3, "perplexity": 9.0,
        "bytes_up": 2, "bytes_down": 4, "log_dir": str(logs),
    }  # fmt: skip
    assert run(capsys, "status", logs).out.startswith("run 9: running, round 1 of 3, perplexity 9.00\n")
    assert_refused(run(capsys, "status", place / "none"), "`fedgraft submit`", as_json=False)


def test_the_status_of_a_superlink_lists_runs_and_nodes(place, capsys, monkeypatch):
    monkeypatch.setattr("server.flower.deployed_run.wait_until_healthy", lambda connection, timeout: None)
    monkeypatch.setattr("server.flower.flower_cli.known_runs", lambda **options: {"9": "running"})
    monkeypatch.setattr("server.flower.flower_cli.known_nodes", lambda **options: {"5": "online"})
    assert run(capsys, "status", *NAMED, "--json").json() == {
        "runs": {"9": "running"},
        "nodes": {"5": "online"},
    }
    assert run(capsys, "status", *NAMED).out == "run 9: running\nnode 5: online\n"


def test_a_run_is_stopped(place, capsys, superlink):
    logs = recorded(place)
    assert run(capsys, "stop", logs, "--json").json() == {
        "run_id": "9",
        "state": "stopped, now=False",
        "log_dir": str(logs),
    }
    assert run(capsys, "stop", logs, "--now").out == "run 9: stopped, now=True\n"
    assert_refused(run(capsys, "stop", place), "`fedgraft submit`", as_json=False)
    assert read_submission(logs) is not None
