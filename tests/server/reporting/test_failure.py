"""The exception record of a ServerApp: written, read, removed."""

from __future__ import annotations

import json

import pytest

from configs.errors import UserError
from server.reporting.failure import FAILURE_FILE, clear_failure, read_failure, recording_failure


def test_an_exception_is_recorded_and_raised_again(tmp_path):
    log_dir = tmp_path / "new" / "logs"
    with pytest.raises(UserError, match="expected a graph"), recording_failure(log_dir):
        raise UserError("expected a graph, got nothing\nsecond line")
    recorded = json.loads((log_dir / FAILURE_FILE).read_text())
    assert recorded == {"type": "UserError", "message": "expected a graph, got nothing"}
    assert read_failure(log_dir) == ("UserError", "expected a graph, got nothing")


def test_an_exception_without_a_message_has_an_empty_one(tmp_path):
    with pytest.raises(AssertionError), recording_failure(tmp_path):
        raise AssertionError
    assert read_failure(tmp_path) == ("AssertionError", "")


def test_an_interrupt_is_not_a_failure(tmp_path):
    with pytest.raises(KeyboardInterrupt), recording_failure(tmp_path):
        raise KeyboardInterrupt
    assert read_failure(tmp_path) is None


def test_the_file_of_an_earlier_run_is_removed(tmp_path):
    for remove in (lambda: clear_failure(tmp_path), lambda: recording_failure(tmp_path).__enter__()):
        (tmp_path / FAILURE_FILE).write_text('{"type": "KeyError", "message": "old"}')
        assert read_failure(tmp_path) == ("KeyError", "old")
        remove()
        assert read_failure(tmp_path) is None


def test_without_a_log_directory_nothing_is_written(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(KeyError), recording_failure(None):
        raise KeyError("x")
    clear_failure(None)
    assert read_failure(None) is None
    assert list(tmp_path.iterdir()) == []


def test_a_failure_that_cannot_be_recorded_does_not_replace_the_exception(tmp_path, monkeypatch, caplog):
    def full(*_):
        raise OSError("disk full")

    monkeypatch.setattr("server.reporting.failure.write_json", full)
    with pytest.raises(KeyError), recording_failure(tmp_path):
        raise KeyError("the cause")
    assert "failure.json could not be written: disk full" in caplog.text
