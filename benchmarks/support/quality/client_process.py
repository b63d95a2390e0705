"""Clients of an in-process federation in a process of their own, whose peak memory is not that of the server."""

from __future__ import annotations

import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context

from flwr.app import Context, Message, RecordDict

from benchmarks.support.process_peak import peak_bytes


class ClientProcess:
    """``clients.client_app`` in a process of its own, called as a ClientApp.

    In a deployment each message starts a process; here all messages of all clients share one, one after the other, and
    the libraries are imported once.

    Attributes:
        seconds: wall time of all calls.
    """

    def __init__(self) -> None:
        self._pool = ProcessPoolExecutor(1, mp_context=get_context("spawn"))
        self.seconds = 0.0

    def __call__(self, message: Message, context: Context) -> Message:
        """Answer of the ClientApp to a message; the state of ``context`` becomes that after it."""
        started = time.perf_counter()
        reply, context.state = self._pool.submit(_answer, message, context).result()
        self.seconds += time.perf_counter() - started
        return reply

    def peak_bytes(self) -> int:
        """Peak resident memory of the process so far, libraries included."""
        return self._pool.submit(peak_bytes).result()

    def __enter__(self) -> ClientProcess:
        return self

    def __exit__(self, *_: object) -> None:
        self._pool.shutdown()


def _answer(message: Message, context: Context) -> tuple[Message, RecordDict]:
    # Imported here: in the process of the clients only.
    from clients.client_app import app

    return app(message, context), context.state
