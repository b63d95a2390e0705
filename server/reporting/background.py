"""Thread beside a block of code."""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager


@contextmanager
def in_background(target: Callable[[threading.Event], None], name: str) -> Iterator[None]:
    """Run a function in a daemon thread for the duration of a ``with`` block, whose end waits for it.

    Args:
        target: called with the event that is set at the end of the block, after which it returns soon.
        name: name of the thread.
    """
    done = threading.Event()
    thread = threading.Thread(target=target, args=(done,), name=name, daemon=True)
    thread.start()
    try:
        yield
    finally:
        done.set()
        thread.join()
