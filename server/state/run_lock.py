"""Locks of a log directory for the life of a run, held by its processes and released by the system when they end."""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import platform
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from configs.errors import UserError

DRIVER_LOCK = "driver.lock"  # of the command that started the run
SERVER_LOCK = "server.lock"  # of the process that runs the ServerApp
POLL_SECONDS = 0.2
# Errors of file systems without locks.
_NO_LOCKS = (errno.ENOLCK, errno.ENOTSUP, errno.ENOSYS, errno.EINVAL)

_log = logging.getLogger(__name__)


@contextmanager
def holding(log_dir: Path, name: str) -> Iterator[None]:
    """Hold the lock ``name`` of a log directory, which is created, during the block; it is released at a kill, too.

    The lock is a file with the process id and the host of its holder. One left by a process that has ended is taken.

    Raises:
        UserError: a running process holds it; names it.
    """
    log_dir.mkdir(parents=True, exist_ok=True)
    path = log_dir / name
    handle = _acquire(path)
    try:
        yield
    finally:
        with suppress(OSError):
            path.unlink()  # before it is released, so that no other holder's file is removed
        os.close(handle)


def check_unused(log_dir: Path, *names: str) -> None:
    """Check that no running process holds one of the locks of a log directory; by default, any.

    Raises:
        UserError: one does; names it.
    """
    for name in names or (DRIVER_LOCK, SERVER_LOCK):
        if (holder := _holder(log_dir / name)) is not None:
            raise _in_use(log_dir, holder)


def wait_until_unused(log_dir: Path, name: str) -> None:
    """Wait until no running process holds the lock ``name`` of a log directory."""
    while _holder(log_dir / name) is not None:
        time.sleep(POLL_SECONDS)


def _acquire(path: Path) -> int:
    """Lock the file and write the holder into it; returns its open handle."""
    while True:
        handle = os.open(path, os.O_RDWR | os.O_CREAT, 0o644)
        try:
            if not _try_lock(handle):
                raise _in_use(path.parent, _read(handle))
            # The file may have been removed by its former holder between the two calls.
            if _is_at(handle, path):
                holder = {"pid": os.getpid(), "host": platform.node()}
                os.ftruncate(handle, 0)
                os.pwrite(handle, json.dumps(holder).encode(), 0)
                return handle
        except BaseException:
            os.close(handle)
            raise
        os.close(handle)


def _holder(path: Path) -> str | None:
    """Name of the process that holds a lock; None where none does."""
    try:
        handle = os.open(path, os.O_RDWR)
    except OSError:  # none, or not ours to lock: the check of the directory says so
        return None
    try:
        return None if _try_lock(handle) else _read(handle)
    finally:
        os.close(handle)


def _try_lock(handle: int) -> bool:
    """Lock an open file; False where another process has locked it. Without locks in the file system: True."""
    try:
        fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        return False
    except OSError as error:
        if error.errno not in _NO_LOCKS:
            raise
        _log.warning("the file system of the log directory has no locks: %s", error)
    return True


def _is_at(handle: int, path: Path) -> bool:
    with suppress(FileNotFoundError):
        return os.path.samestat(os.fstat(handle), path.stat())
    return False


def _read(handle: int) -> str:
    try:
        holder = json.loads(os.pread(handle, 4096, 0))
        return f"process {int(holder['pid'])} on {holder['host']}"
    except (ValueError, TypeError, KeyError):  # it has not been written yet
        return "another process"


def _in_use(log_dir: Path, holder: str) -> UserError:
    return UserError(
        f"expected a log directory that no run uses, got {log_dir}, in use by {holder}; wait for the end of that run, "
        "end it, or set another `log_dir`"
    )
