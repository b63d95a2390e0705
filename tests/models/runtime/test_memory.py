from __future__ import annotations

import ctypes

import pytest

from models.runtime import memory
from models.runtime.memory import return_freed_memory


def test_the_c_library_is_asked_where_it_can(monkeypatch):
    asked = []

    class Library:
        def malloc_trim(self, pad):
            asked.append(pad.value)

    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: Library())
    assert return_freed_memory() and asked == [0]


@pytest.mark.parametrize("error", [OSError, TypeError])
def test_other_systems_are_left_alone(monkeypatch, error):
    def fail(name):
        raise error

    monkeypatch.setattr(memory.ctypes, "CDLL", fail)
    assert not return_freed_memory()
    monkeypatch.setattr(memory.ctypes, "CDLL", lambda name: object())
    assert not return_freed_memory()


def test_it_can_be_called_here():
    assert return_freed_memory() == hasattr(ctypes.CDLL(None), "malloc_trim")
