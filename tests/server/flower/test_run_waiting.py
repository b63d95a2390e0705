"""Waiting for the end of a run with a script in the place of Flower's command line."""

from __future__ import annotations

import pytest

from server.flower.flower_cli import NoAnswer
from server.flower.flower_process import RunFailed
from server.flower.run_waiting import wait_for_run

COMPLETED = '{"success": true, "runs": [{"status": "finished:completed", "status-details": "N/A"}]}'
RUNNING = COMPLETED.replace("finished:completed", "running")
UNAVAILABLE = '{"success": false, "error-message": "Connection to the SuperLink is unavailable."}'


def test_waiting_follows_the_log_until_the_status_is_final(tmp_path, fake_flwr):
    script = f"""
case $1 in
log) printf '\\033[92mINFO\\033[0m: hello\\n' ;;
ls) if [ -e {tmp_path}/asked ]; then echo '{COMPLETED}'; else touch {tmp_path}/asked; echo '{RUNNING}'; fi ;;
esac"""
    log_file = tmp_path / "flower.log"
    status = wait_for_run("17", log_file=log_file, timeout=30, **fake_flwr(script))
    assert status.finished
    assert status.state == "finished:completed"
    assert log_file.read_text() == "INFO: hello\n"


def test_waiting_ends_at_the_timeout(tmp_path, fake_flwr):
    script = f"case $1 in log) exec sleep 60 ;; ls) echo '{RUNNING}' ;; esac"
    with pytest.raises(RunFailed, match="did not finish within 1 s"):
        wait_for_run("17", log_file=tmp_path / "flower.log", timeout=1, **fake_flwr(script))


def test_an_outage_is_waited_for_and_the_log_is_read_again(tmp_path, fake_flwr):
    """The first stream breaks off, the SuperLink is away for one query, the run goes on for two."""
    script = f"""
case $1 in
log) echo stream >> {tmp_path}/streams; cat {tmp_path}/streams ;;
ls) echo query >> {tmp_path}/queries
    case $(wc -l < {tmp_path}/queries) in
    1) echo '{UNAVAILABLE}' ;;
    2 | 3) echo '{RUNNING}' ;;
    *) echo '{COMPLETED}' ;;
    esac ;;
esac"""
    log_file = tmp_path / "flower.log"
    assert wait_for_run("17", log_file=log_file, timeout=60, **fake_flwr(script)).finished
    assert log_file.read_text() == "stream\nstream\n"
    assert len((tmp_path / "queries").read_text().splitlines()) == 4


def test_a_superlink_that_stays_away_ends_the_wait(tmp_path, fake_flwr, monkeypatch):
    monkeypatch.setattr("server.flower.run_waiting.OUTAGE_SECONDS", 1.5)
    script = f"case $1 in log) true ;; ls) echo '{UNAVAILABLE}' ;; esac"
    with pytest.raises(NoAnswer, match="SuperLink is unavailable"):
        wait_for_run("17", log_file=tmp_path / "flower.log", timeout=60, **fake_flwr(script))


def test_a_run_that_the_superlink_does_not_know_ends_the_wait_at_once(tmp_path, fake_flwr):
    unknown = '{"success": false, "error-message": "Run ID not found"}'
    with pytest.raises(RunFailed, match="Run ID not found") as failure:
        wait_for_run(
            "17",
            log_file=tmp_path / "flower.log",
            timeout=60,
            **fake_flwr(f"case $1 in log) true ;; ls) echo '{unknown}' ;; esac"),
        )
    assert not isinstance(failure.value, NoAnswer)
