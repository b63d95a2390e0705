from __future__ import annotations

import json

import pytest

from configs.errors import Interrupted, UserError
from scripts.shared.follow import follow_to_end, recorded_submission
from server.flower.connection import Connection
from server.flower.submission import Submission
from tests.support.run_summaries import SUMMARY

SUBMISSION = Submission("17", Connection("127.0.0.1:1", insecure=True), {"num-rounds": 3})


def test_a_followed_run_ends_with_its_summary(tmp_path, capsys, monkeypatch):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    calls = []
    monkeypatch.setattr(
        "server.flower.deployed_run.follow_run", lambda *given, **options: calls.append(given)
    )
    monkeypatch.setattr("server.flower.deployed_run.fetch_results", lambda *given: calls.append(given))
    follow_to_end(SUBMISSION, tmp_path, timeout=None, as_json=True)
    assert json.loads(capsys.readouterr().out) == SUMMARY
    assert calls == [(SUBMISSION, tmp_path)] * 2


def test_an_interrupt_says_that_the_run_goes_on(tmp_path, monkeypatch):
    def interrupted(*_, **__):
        raise KeyboardInterrupt

    monkeypatch.setattr("server.flower.deployed_run.follow_run", interrupted)
    with pytest.raises(Interrupted, match="run 17 goes on: `fedgraft resume .*`fedgraft stop"):
        follow_to_end(SUBMISSION, tmp_path, timeout=None, as_json=False)


def test_a_directory_without_a_record_is_refused(tmp_path):
    with pytest.raises(UserError, match="expected the log directory of `fedgraft submit`"):
        recorded_submission(tmp_path)
    SUBMISSION.write(tmp_path)
    assert recorded_submission(tmp_path) == SUBMISSION
