"""Callbacks of the page: errors as messages of one line, with the labels of the page for the fields they name."""

from __future__ import annotations

import functools
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import gradio as gr

from configs.errors import UserError, first_line, name_fields

LABELS = {
    "metric": "Metric",
    "n_prune": "Experts to remove",
    "ignore_experts": "Ignored experts",
    "guard_top": "Guard the best %",
    "min_rank": "Smallest rank",
    "max_rank": "Largest rank",
    "min_experts_per_layer": "experts per layer",
    "model": "Model",
    "run": "Run",
    "name": "Name of the output",
    "data": "Data",
}


def message_of(error: Exception) -> str:
    """Message of an error in one line: fields of a ``UserError`` by their labels, other errors with their class."""
    if isinstance(error, UserError):
        return name_fields(" ".join(str(error).split()), lambda field: f"“{LABELS.get(field, field)}”")
    return f"{type(error).__name__}: {first_line(error)}"


def callback(function: Callable[..., Any]) -> Callable[..., Any]:
    """Turn errors of a function or generator into ``gr.Error`` of one line, without a traceback on the page.

    The traceback of an unexpected error is logged.
    """
    if inspect.isgeneratorfunction(function):

        @functools.wraps(function)
        def steps(*values: Any) -> Iterator[Any]:
            with _errors_in_one_line():
                yield from function(*values)

        return steps

    @functools.wraps(function)
    def call(*values: Any) -> Any:
        with _errors_in_one_line():
            return function(*values)

    return call


@contextmanager
def _errors_in_one_line() -> Iterator[None]:
    try:
        yield
    except gr.Error:
        raise
    except Exception as error:  # noqa: BLE001 - the boundary: a failure is one line on the page
        if not isinstance(error, UserError):
            logging.getLogger(__name__).exception("callback failed")
        raise gr.Error(message_of(error), print_exception=False) from None
