"""Log files that cannot be written: a warning for each, and an entry in the summary; the run goes on."""

from __future__ import annotations

import logging
from collections.abc import Callable
from typing import Any

from configs.errors import first_line

_log = logging.getLogger(__name__)


class LogFailures:
    """Failed writes of a run's log files.

    Attributes:
        reasons: reason of the first failure by file.
    """

    def __init__(self) -> None:
        self.reasons: dict[str, str] = {}

    def attempt(self, file: str, write: Callable[..., None], *arguments: Any, **options: Any) -> None:
        """Call ``write``; of its exceptions the first for ``file`` becomes a warning and a reason, others nothing.

        The traceback is in the log unless the system refused the write.
        """
        try:
            write(*arguments, **options)
        except Exception as error:  # noqa: BLE001 - no log file is worth a training
            if file in self.reasons:
                return
            self.reasons[file] = f"{type(error).__name__}: {first_line(error)}"
            _log.warning(
                "the log file %s is incomplete, the run goes on: %s",
                file,
                self.reasons[file],
                exc_info=None if isinstance(error, OSError) else error,
            )
