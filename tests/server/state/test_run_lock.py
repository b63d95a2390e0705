"""Locks of a log directory: who holds one, when it is taken over, and what a second run is told."""

from __future__ import annotations

import errno
import json
import os
import platform
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest

from configs.errors import UserError
from server.state.run_lock import DRIVER_LOCK, SERVER_LOCK, check_unused, holding, wait_until_unused
from tests.support.paths import ROOT

HOLDS = """
import sys, time
from pathlib import Path
from server.state.run_lock import holding
with holding(Path(sys.argv[1]), sys.argv[2]):
    print("held", flush=True)
    time.sleep(60)
"""


@pytest.fixture
def holder(tmp_path):
    """A process that holds the lock of the ServerApp."""
    process = subprocess.Popen(
        [sys.executable, "-c", HOLDS, tmp_path / "logs", SERVER_LOCK], cwd=ROOT, stdout=subprocess.PIPE
    )
    assert process.stdout.read(4) == b"held"
    yield process
    process.kill()
    process.wait()
    process.stdout.close()


def test_a_lock_names_its_holder_and_is_removed_at_the_end(tmp_path):
    with holding(tmp_path / "logs", DRIVER_LOCK):
        held = json.loads((tmp_path / "logs" / DRIVER_LOCK).read_text())
        assert held == {"pid": os.getpid(), "host": platform.node()}
        with holding(tmp_path / "logs", SERVER_LOCK):
            assert len(list((tmp_path / "logs").iterdir())) == 2
    assert list((tmp_path / "logs").iterdir()) == []


def test_a_directory_in_use_is_refused_with_the_process_named(tmp_path, holder):
    named = f"{tmp_path / 'logs'}, in use by process {holder.pid} on {platform.node()}; .*`log_dir`"
    with pytest.raises(UserError, match=named), holding(tmp_path / "logs", SERVER_LOCK):
        raise AssertionError("the block must not run")
    with pytest.raises(UserError, match=named):
        check_unused(tmp_path / "logs")
    check_unused(tmp_path / "logs", DRIVER_LOCK)
    check_unused(tmp_path / "absent")
    assert json.loads((tmp_path / "logs" / SERVER_LOCK).read_text())["pid"] == holder.pid


def test_the_lock_of_a_killed_process_is_taken_over(tmp_path, holder):
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert (tmp_path / "logs" / SERVER_LOCK).exists()
    check_unused(tmp_path / "logs")
    with holding(tmp_path / "logs", SERVER_LOCK):
        assert json.loads((tmp_path / "logs" / SERVER_LOCK).read_text())["pid"] == os.getpid()


def test_waiting_lasts_as_long_as_the_lock(tmp_path, holder):
    ended = []
    waiter = threading.Thread(
        target=lambda: (wait_until_unused(tmp_path / "logs", SERVER_LOCK), ended.append(True))
    )
    waiter.start()
    time.sleep(0.5)
    assert ended == []
    holder.kill()
    waiter.join(timeout=10)
    assert ended == [True]


def test_a_file_removed_between_opening_and_locking_is_made_again(tmp_path, monkeypatch):
    """Its former holder ends just then."""
    path = tmp_path / DRIVER_LOCK
    path.touch()
    opened, real = [], os.open

    def open_then_lose(name, flags, mode=0o777):
        handle = real(name, flags, mode)
        opened.append(name)
        if len(opened) == 1:
            Path(name).unlink()
        return handle

    monkeypatch.setattr("server.state.run_lock.os.open", open_then_lose)
    with holding(tmp_path, DRIVER_LOCK):
        assert len(opened) == 2 and json.loads(path.read_text())["pid"] == os.getpid()


@pytest.mark.parametrize("content", ["", "[]", '{"pid": "x"}'])
def test_a_holder_that_is_not_yet_written_is_another_process(tmp_path, content):
    with holding(tmp_path, DRIVER_LOCK):
        (tmp_path / DRIVER_LOCK).write_text(content)
        with pytest.raises(UserError, match="in use by another process"):
            check_unused(tmp_path)


def test_without_locks_in_the_file_system_the_run_goes_on_with_a_warning(tmp_path, monkeypatch, caplog):
    def unsupported(*_):
        raise OSError(errno.ENOLCK, os.strerror(errno.ENOLCK))

    monkeypatch.setattr("server.state.run_lock.fcntl.flock", unsupported)
    with holding(tmp_path, DRIVER_LOCK):
        pass
    assert "has no locks" in caplog.text
