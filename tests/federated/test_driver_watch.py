"""Processes that end with the one that drives them."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

from federated.driver_watch import DRIVER_VARIABLE, driver_mark, has_ended, wait_for_end
from tests.support.paths import ROOT

SLEEPS = "import time; time.sleep(60)"
# A process in a session of its own that is watched; it prints its id once the watch is set.
WATCHED = """
import os, sys, time
from federated import driver_watch
driver_watch.GRACE_SECONDS = 0.1
driver_watch.end_with_driver()
driver_watch.end_with_driver()
print(os.getpid(), flush=True)
time.sleep(60)
"""
DRIVER = f"""
import os, subprocess, sys, time
from federated.driver_watch import DRIVER_VARIABLE, driver_mark
env = os.environ | {{DRIVER_VARIABLE: driver_mark()}}
subprocess.Popen([sys.executable, "-c", {WATCHED!r}], env=env, start_new_session=True)
time.sleep(60)
"""


@pytest.fixture
def sleeper():
    process = subprocess.Popen([sys.executable, "-c", SLEEPS])
    yield process
    process.kill()
    process.wait()


def test_a_mark_is_that_of_one_process_until_its_end(sleeper):
    mark = driver_mark(sleeper.pid)
    assert not has_ended(mark) and not has_ended(driver_mark())
    assert driver_mark() == driver_mark(os.getpid()) != mark
    pid, _, started = mark.partition(":")
    assert has_ended(f"{pid}:{float(started) - 1}"), "another process had the number before"
    sleeper.kill()
    wait_for_end(mark)  # although its parent has not asked for its exit code yet
    assert psutil.Process(sleeper.pid).status() == psutil.STATUS_ZOMBIE
    sleeper.wait()
    assert has_ended(mark)
    with pytest.raises(psutil.Error):
        driver_mark(sleeper.pid)


def test_a_child_of_a_killed_driver_ends():
    driver = subprocess.Popen([sys.executable, "-c", DRIVER], cwd=ROOT, stdout=subprocess.PIPE)
    child = psutil.Process(int(driver.stdout.readline()))
    time.sleep(0.6)
    assert child.is_running() and child.status() != psutil.STATUS_ZOMBIE
    driver.send_signal(signal.SIGKILL)
    driver.wait()
    driver.stdout.close()
    deadline = time.monotonic() + 10
    while time.monotonic() < deadline and child.is_running() and child.status() != psutil.STATUS_ZOMBIE:
        time.sleep(0.1)
    assert not child.is_running() or child.status() == psutil.STATUS_ZOMBIE


def test_without_a_named_driver_nothing_is_watched():
    code = "import threading; from federated.driver_watch import end_with_driver as end; end()"
    code += "; print(threading.active_count())"
    env = {name: value for name, value in os.environ.items() if name != DRIVER_VARIABLE}
    result = subprocess.run([sys.executable, "-c", code], cwd=ROOT, env=env, capture_output=True, text=True)
    assert result.stdout == "1\n"
