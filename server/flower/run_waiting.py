"""Waiting for the end of a run: its log is streamed to a file, its status is queried; both outlast a restart."""

from __future__ import annotations

import re
import subprocess
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

from configs.output import write_bytes
from server.flower.connection import CONNECTION
from server.flower.flower_cli import NoAnswer, RunStatus, run_status
from server.flower.flower_process import RunFailed, start_process

ASK_SECONDS = 30.0  # between two status queries while the log stream is open
OUTAGE_SECONDS = 120.0  # for which a SuperLink may not answer


def wait_for_run(
    run_id: str, *, env: Mapping[str, str], cwd: Path, log_file: Path, timeout: float
) -> RunStatus:
    """Stream the log of a run into ``log_file`` until it has finished; returns its final status.

    The status is queried every ASK_SECONDS while the log stream is open, because a query takes a second of CPU and
    the stream ends with the run. A SuperLink that starts again within OUTAGE_SECONDS does not end the wait: with a
    database it knows the run, and its ServerApp may have an executor apart from it.

    Raises:
        RunFailed: the run did not finish within ``timeout`` seconds, or the SuperLink does not answer or does not know
            the run.
    """
    deadline = time.monotonic() + timeout
    answered, idle = time.monotonic(), 0
    log_file.unlink(missing_ok=True)  # another process may still write into the one of an earlier stream
    with _log_stream(run_id, log_file, env=env, cwd=cwd) as stream:
        while (left := deadline - time.monotonic()) > 0:
            stream.wait(min(ASK_SECONDS, left))
            try:
                status = run_status(run_id, env=env, cwd=cwd)
            except NoAnswer:
                if time.monotonic() - answered > OUTAGE_SECONDS:
                    raise
                time.sleep(1.0)
                continue
            answered, idle = time.monotonic(), idle + 1 if stream.ended else 0
            if status.finished:
                stream.wait(10.0)
                return status
            if idle > 1:  # an interrupted stream, not one that ends a moment before its run
                stream.start()
            time.sleep(0.5)
    raise RunFailed(f"the run did not finish within {timeout:.0f} s (log: {log_file})")


class _LogStream:
    """``flwr log --stream``, which repeats the log from its start.

    Args:
        command: of the stream.
        log: file that its output replaces.
        env, cwd: environment and working directory.
    """

    def __init__(self, command: list[str], log: IO[bytes], *, env: Mapping[str, str], cwd: Path) -> None:
        self._command, self._log, self._env, self._cwd = command, log, env, cwd
        self._process = self._started()

    @property
    def ended(self) -> bool:
        """Whether the stream has ended, as it does with the run or its connection."""
        return self._process.poll() is not None

    def wait(self, seconds: float) -> None:
        """Wait for the end of the stream, at most ``seconds``."""
        with suppress(subprocess.TimeoutExpired):
            self._process.wait(timeout=seconds)

    def start(self) -> None:
        """Start the stream again after it ended."""
        self._log.truncate(0)
        self._process = self._started()

    def stop(self) -> None:
        """End the stream."""
        self._process.kill()
        self._process.wait()

    def _started(self) -> subprocess.Popen[bytes]:
        return start_process(self._command, env=self._env, cwd=self._cwd, stdout=self._log)


@contextmanager
def _log_stream(run_id: str, log_file: Path, *, env: Mapping[str, str], cwd: Path) -> Iterator[_LogStream]:
    command = ["flwr", "log", run_id, CONNECTION, "--stream"]
    with log_file.open(
        "ab"
    ) as log:  # in append mode a stream that starts again writes at the start of the file
        stream = _LogStream(command, log, env=env, cwd=cwd)
        try:
            yield stream
        finally:
            stream.stop()
            _strip_colors(log_file)


def _strip_colors(path: Path) -> None:
    with suppress(OSError):  # a full disk: the log keeps its colors
        write_bytes(path, re.sub(rb"\x1b\[[0-9;]*m", b"", path.read_bytes()))
