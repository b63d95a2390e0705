"""End of a process with the command that drives its run, also where that is killed and can end nothing itself."""

from __future__ import annotations

import logging
import os
import threading
import time
from contextlib import suppress

import psutil

DRIVER_VARIABLE = "FEDGRAFT_DRIVER"  # environment variable with the mark of the driver
WATCH_SECONDS = 0.25  # between two looks at the driver
# After the end of the driver until a process ends itself: the guard of the job, which finds more processes while their
# parents are alive, comes first.
GRACE_SECONDS = 3.0

_log = logging.getLogger(__name__)
_started = threading.Lock()  # held from the first watch on


def driver_mark(pid: int | None = None) -> str:
    """Process id and start time of a running process, by default this one; the number alone may be used again.

    Raises:
        psutil.Error: there is no such process.
    """
    process = psutil.Process(pid)
    return f"{process.pid}:{process.create_time()}"


def has_ended(mark: str) -> bool:
    """Whether the process of ``driver_mark`` has ended."""
    pid, _, started = mark.partition(":")
    with suppress(psutil.Error):
        process = psutil.Process(int(pid))
        return process.create_time() != float(started) or process.status() == psutil.STATUS_ZOMBIE
    return True


def wait_for_end(mark: str) -> None:
    """Wait until the process of ``driver_mark`` has ended."""
    while not has_ended(mark):
        time.sleep(WATCH_SECONDS)


def end_with_driver() -> None:
    """End this process, without clean-up, GRACE_SECONDS after the driver that the environment names has ended.

    No effect without the variable, as in a deployment, whose processes are services, and after the first call.
    """
    mark = os.environ.get(DRIVER_VARIABLE)
    if mark and _started.acquire(blocking=False):
        threading.Thread(target=_end_after, args=(mark,), name="watch-driver", daemon=True).start()


def _end_after(mark: str) -> None:
    wait_for_end(mark)
    time.sleep(GRACE_SECONDS)
    _log.error("the command that drives this run has ended: this process ends, too")
    os._exit(1)
