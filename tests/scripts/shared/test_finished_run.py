from __future__ import annotations

import json

import pytest
import typer

from scripts.shared.finished_run import print_finished, unused_clients
from server.flower.flower_process import RunFailed
from tests.support.run_summaries import SUMMARY


def test_unused_clients_alone_are_collected(tmp_path):
    (tmp_path / "failure.json").write_text('{"type": "UnusedClients", "message": "got none of a"}')
    with unused_clients(tmp_path) as failure:
        raise RunFailed("the run ended")
    assert failure == ["got none of a"]
    (tmp_path / "failure.json").unlink()
    with pytest.raises(RunFailed), unused_clients(tmp_path):
        raise RunFailed("the run ended")


def test_a_summary_is_printed_and_a_failure_is_the_exit_code(tmp_path, capsys):
    (tmp_path / "summary.json").write_text(json.dumps(SUMMARY))
    print_finished(tmp_path, failure=[], out="", as_json=True)
    assert json.loads(capsys.readouterr().out) == SUMMARY
    with pytest.raises(typer.Exit) as stopped:
        print_finished(tmp_path, failure=["got none of a"], out="", as_json=True)
    assert stopped.value.exit_code == 1
    assert capsys.readouterr().err == "fedgraft: error: got none of a\n"


def test_a_missing_summary_is_an_error_that_names_the_model(tmp_path):
    with pytest.raises(RuntimeError, match="flower.log; the model is in /out"):
        print_finished(tmp_path, failure=[], out="/out", as_json=False)
