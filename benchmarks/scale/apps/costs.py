"""CPU seconds of the server's thread by round and part, and the peak memory of its process."""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any

from benchmarks.support.process_peak import peak_bytes
from configs.output import write_json

COSTS_FILE = "server_costs.json"


@dataclass
class Part:
    """Name under which a block of code is counted; may be changed in the block."""

    name: str


class ServerCosts:
    """Counter of the CPU seconds of the calling thread, which are not those of the clients or of waiting.

    Attributes:
        rounds: by round, CPU seconds by part; ``other`` is what no part covers.
    """

    def __init__(self) -> None:
        self.rounds: dict[int, defaultdict[str, float]] = {}
        self._current: int | None = None
        self._since = 0.0

    def begin(self, server_round: int) -> bool:
        """Begin a round, unless it has begun; returns whether it is a new one."""
        if server_round == self._current:
            return False
        self._close()
        self._current, self._since = server_round, time.thread_time()
        self.rounds[server_round] = defaultdict(float)
        return True

    @contextmanager
    def counting(self, name: str) -> Iterator[Part]:
        """Count the CPU seconds of the block as those of a part; parts do not nest."""
        part, started = Part(name), time.thread_time()
        yield part
        if self._current is not None:
            self.rounds[self._current][part.name] += time.thread_time() - started

    def counted(self, name: str, method: Callable[..., Any]) -> Callable[..., Any]:
        """The method, counted as a part."""

        @wraps(method)
        def call(*arguments: Any, **options: Any) -> Any:
            with self.counting(name):
                return method(*arguments, **options)

        return call

    def write(self, log_dir: Path) -> None:
        """Close the last round and write all costs."""
        self._close()
        rounds = [{"round": number, **seconds} for number, seconds in self.rounds.items()]
        write_json(log_dir / COSTS_FILE, {"rounds": rounds, "peak_bytes": peak_bytes()})

    def _close(self) -> None:
        if self._current is not None:
            seconds = self.rounds[self._current]
            seconds["other"] = time.thread_time() - self._since - sum(seconds.values())
            self._current = None
