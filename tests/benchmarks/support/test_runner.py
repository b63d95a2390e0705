from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import typer

from benchmarks.support.material import DEMO_MODEL, SHARED
from benchmarks.support.process_peak import peak_bytes
from benchmarks.support.runner import (
    RESULTS,
    Measured,
    exit_on_bad_input,
    measured_result,
    report_resumable,
    run_resumable,
)
from configs.errors import UserError
from tests.support.paths import ROOT
from tests.support.paths import SHARED as TEST_SHARED


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    held = np.ones(300 * 2**20, dtype=np.uint8)
    assert peak_bytes() > held.nbytes
    imports = "from benchmarks.support.process_peak import peak_bytes; import numpy; "
    code = imports + "print(peak_bytes())"
    alone = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    big = imports + "x = numpy.ones(300 << 20, dtype='u1'); "
    grown = int(
        subprocess.run(
            [sys.executable, "-c", big + "print(peak_bytes())"], capture_output=True, text=True
        ).stdout
    )
    assert 250 * 2**20 < grown - alone < 350 * 2**20


def test_results_and_material_are_those_of_the_checkout():
    assert RESULTS == ROOT / "benchmarks" / "results" and (RESULTS / "wire.json").is_file()
    assert (DEMO_MODEL / "config.json").is_file()
    assert os.environ.get("FEDGRAFT_SHARED") or SHARED == TEST_SHARED


def test_the_time_of_finished_runs_stands_in_place_of_that_of_the_process():
    def measure(quick, on_step):
        return Measured(figures={"a": 1.0}, seconds=4000.04 if quick else None)

    assert measured_result("a", measure, quick=True)["seconds"] == 4000.0
    assert measured_result("a", measure, quick=False)["seconds"] < 60


def test_bad_input_is_one_line_on_stderr_and_exit_code_2(capsys):
    with pytest.raises(typer.Exit) as ended, exit_on_bad_input():
        raise UserError("expected [data], got none")
    assert ended.value.exit_code == 2 and capsys.readouterr().err == "error: expected [data], got none\n"


def _folder_measured(quick: bool, on_step: object, *, work: Path | None) -> Measured:
    if work is None:
        raise UserError("expected a folder")
    return Measured(figures={"quick": float(quick)}, notes={"quick": str(work)})


def test_the_command_line_of_a_resumable_benchmark_gives_its_folder_to_the_measurement(
    tmp_path, capsys, monkeypatch
):
    monkeypatch.setattr(sys, "argv", ["a", "--quick", "--work", str(tmp_path), "--json"])
    with pytest.raises(SystemExit) as ended:
        run_resumable("a", _folder_measured)
    assert not ended.value.code
    printed = json.loads(capsys.readouterr().out)
    assert (printed["figures"], printed["notes"]) == ({"quick": 1.0}, {"quick": str(tmp_path)})


def test_a_full_resumable_benchmark_writes_its_result_and_uses_the_users_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDGRAFT_CACHE", str(tmp_path / "cache"))
    monkeypatch.setattr("benchmarks.support.runner.RESULTS", tmp_path / "results")
    report_resumable("a", _folder_measured, quick=False, work=None, as_json=True)
    written = json.loads((tmp_path / "results" / "a.json").read_text())
    assert written["figures"] == {"quick": 0.0}
    assert written["notes"] == {"quick": str(tmp_path / "cache" / "benchmarks" / "a")}


def test_a_quick_resumable_benchmark_gets_no_folder_and_writes_nothing(tmp_path, monkeypatch):
    monkeypatch.setattr("benchmarks.support.runner.RESULTS", tmp_path / "results")
    with pytest.raises(typer.Exit):
        report_resumable("a", _folder_measured, quick=True, work=None, as_json=True)
    assert not (tmp_path / "results").exists()
