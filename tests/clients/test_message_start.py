from __future__ import annotations

import subprocess
import sys
import time

import pytest

from tests.support.paths import ROOT

CODE = """
import time
time.sleep(0.5)
from clients.message_start import message_start
first = message_start()
time.sleep(0.2)
print(time.time() - first, time.time() - message_start())
"""


def test_the_first_message_starts_with_its_process_and_a_later_one_when_it_comes():
    before = time.time()
    result = subprocess.run(
        [sys.executable, "-c", CODE], cwd=ROOT, capture_output=True, text=True, check=True
    )
    first, second = map(float, result.stdout.split())
    assert 0.7 <= first <= time.time() - before + 0.1  # the start of a process is known to 10 ms
    assert second == pytest.approx(0, abs=0.2)
