"""Commands of ``fedgraft`` as child processes, with their progress, result and cancellation."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from configs.errors import UserError

_COMMAND = Path(__file__).parents[2] / "fedgraft.py"
_STEP = re.compile(r"(?P<stage>.+) (?P<done>\d+)(?:/(?P<total>\d+))?, \d+ s")
_WARNING = "fedgraft: warning: "
_PROGRESS_SECONDS = "0.3"
POLL_SECONDS = 0.2
STOP_SECONDS = 20.0  # from the request to end to SIGKILL
CANCELED = "canceled; nothing was written"


@dataclass(frozen=True)
class Progress:
    """State of a job.

    Attributes:
        text: stage and steps; the last line of output of a command without stages.
        share: share of the steps that is done, 0 to 1; None where it is unknown.
    """

    text: str
    share: float | None = None


class Job:
    """A command of ``fedgraft`` in a process of its own, whose memory is freed with it and which can be canceled.

    Args:
        arguments: of ``fedgraft``; ``--json`` is added.
        folder: of the files of its output.
    """

    def __init__(self, arguments: Sequence[str], folder: Path) -> None:
        self.arguments = [*arguments, "--json"]
        self._out, self._err = folder / "stdout", folder / "stderr"
        self._process: subprocess.Popen | None = None
        self.canceled = False

    @property
    def running(self) -> bool:
        """Whether the process is alive."""
        return self._process is not None and self._process.poll() is None

    def start(self) -> None:
        """Start the process."""
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = subprocess.Popen(
                [sys.executable, str(_COMMAND), *self.arguments],
                stdin=subprocess.DEVNULL,
                stdout=out,
                stderr=err,
                env={**os.environ, "FEDGRAFT_PROGRESS_SECONDS": _PROGRESS_SECONDS},
                start_new_session=True,
                # A server in the background of a shell ignores SIGINT, and its children would, too.
                preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),
            )

    def progress(self) -> Progress:
        """Last stage that the process reported, or its last line."""
        lines = [line for line in self._lines() if not line.startswith(_WARNING)]
        if not lines:
            return Progress("starting")
        if (step := _STEP.fullmatch(lines[-1])) is None:
            return Progress(lines[-1])
        done, total = int(step["done"]), int(step["total"] or 0)
        return Progress(
            f"{step['stage']} {done}{f' of {total}' if total else ''}", done / total if total else None
        )

    def warnings(self) -> list[str]:
        """Warnings of the process."""
        return [line.removeprefix(_WARNING) for line in self._lines() if line.startswith(_WARNING)]

    def follow(self) -> Iterator[Progress]:
        """Progress until the process ends."""
        assert self._process is not None
        while True:
            try:
                self._process.wait(POLL_SECONDS)
                return
            except subprocess.TimeoutExpired:
                yield self.progress()

    def result(self) -> dict[str, Any]:
        """JSON object that the finished process printed.

        Raises:
            UserError: the process failed or was canceled.
        """
        if self.canceled:
            raise UserError(CANCELED)
        try:
            result = json.loads(self._out.read_text(encoding="utf-8"))
        except ValueError:
            last = (self._lines() or ["no output"])[-1]
            raise UserError(f"the command ended without a result: {last}") from None
        if "error" in result:
            raise UserError(str(result["error"]))
        return result

    def cancel(self) -> None:
        """Interrupt the process as Ctrl-C does; it is killed where it goes on for ``STOP_SECONDS``."""
        process = self._process
        if process is None or process.poll() is not None:
            return
        self.canceled = True
        process.send_signal(signal.SIGINT)
        threading.Thread(target=_end, args=(process,), name="end-job", daemon=True).start()

    def _lines(self) -> list[str]:
        try:
            text = self._err.read_text(encoding="utf-8", errors="replace")
        except FileNotFoundError:
            return []
        return [line.strip() for line in text.splitlines() if line.strip()]


def _end(process: subprocess.Popen) -> None:
    try:
        process.wait(STOP_SECONDS)
    except subprocess.TimeoutExpired:
        process.kill()


def command_line(*arguments: str) -> str:
    """A command of ``fedgraft`` as text for a shell."""
    return shlex.join(["fedgraft", *arguments])
