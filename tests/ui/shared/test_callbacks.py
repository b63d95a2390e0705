from __future__ import annotations

import inspect

import gradio as gr
import pytest

from configs.errors import UserError
from ui.shared.callbacks import callback, message_of


def refuse(value: int) -> int:
    raise UserError(f"expected `n_prune`\nof 1, got {value}; set `other`")


def steps(value: int):
    yield value
    raise OSError("disk full\nmore")


def test_messages_have_one_line_and_the_labels_of_the_page():
    assert message_of(UserError("expected `n_prune`\n of 1")) == "expected “Experts to remove” of 1"
    assert message_of(OSError("disk full\nat once")) == "OSError: disk full"


def test_errors_of_a_function_are_shown_without_a_traceback():
    with pytest.raises(gr.Error) as caught:
        callback(refuse)(3)
    assert caught.value.message == "expected “Experts to remove” of 1, got 3; set “other”"
    assert caught.value.print_exception is False and caught.value.__suppress_context__


def test_errors_of_a_generator_are_shown_after_its_steps(caplog):
    found = callback(steps)(7)
    assert next(found) == 7
    with pytest.raises(gr.Error) as caught:
        next(found)
    assert caught.value.message == "OSError: disk full" and "callback failed" in caplog.text


def test_values_pass_and_the_signature_stays():
    assert callback(lambda value: value + 1)(1) == 2
    assert inspect.signature(callback(refuse)) == inspect.signature(refuse)
