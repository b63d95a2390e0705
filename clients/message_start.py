"""Start of the work for a message: that of the process where the message is its first."""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import psutil

_first = True


def message_start() -> float:
    """Time (``time.time``) at which the work for a message began; called once per message.

    In a deployment every message starts a process, whose imports belong to the cost of the message; in a simulation a
    process handles many.
    """
    global _first
    first, _first = _first, False
    return time.time() - (_process_age() if first else 0.0)


def _process_age() -> float:
    """Seconds since the start of this process."""
    if sys.platform != "linux":
        return time.time() - psutil.Process().create_time()
    # To a hundredth of a second; psutil's time of the boot is rounded to seconds.
    ticks = int(Path("/proc/self/stat").read_text().rpartition(")")[2].split()[19])
    return time.clock_gettime(time.CLOCK_BOOTTIME) - ticks / os.sysconf("SC_CLK_TCK")
