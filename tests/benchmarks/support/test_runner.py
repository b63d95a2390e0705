from __future__ import annotations

import os
import subprocess
import sys

import numpy as np

from benchmarks.support.material import DEMO_MODEL, SHARED
from benchmarks.support.process_peak import peak_bytes
from benchmarks.support.runner import RESULTS, Measured, measured_result
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
