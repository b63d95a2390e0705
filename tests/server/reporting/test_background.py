from __future__ import annotations

import threading

import pytest

from server.reporting.background import in_background


def test_a_function_runs_beside_the_block_and_has_returned_after_it():
    seen = []
    started = threading.Event()

    def follow(done: threading.Event) -> None:
        seen.append(threading.current_thread().name)
        started.set()
        done.wait()
        seen.append("end")

    with in_background(follow, "follow"):
        assert started.wait(20) and seen == ["follow"]
    assert seen == ["follow", "end"]


def test_it_ends_after_an_exception_of_the_block_too():
    ended = []
    with pytest.raises(KeyError), in_background(lambda done: ended.append(done.wait(20)), "wait"):
        raise KeyError
    assert ended == [True]
