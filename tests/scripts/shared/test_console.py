from __future__ import annotations

import io
import json
import math
import warnings

import pytest
from rich.console import Console
from rich.table import Table

from scripts.shared import console
from scripts.shared.console import (
    finite,
    option_names,
    print_result,
    progress,
    quiet_libraries,
    warnings_as_lines,
)


def test_numbers_that_json_does_not_know_become_null():
    value = {"a": [1.5, math.nan, (math.inf, -math.inf)], "b": {"c": 2, "d": True, "e": "nan", "f": None}}
    assert finite(value) == {"a": [1.5, None, [None, None]], "b": {"c": 2, "d": True, "e": "nan", "f": None}}


def test_json_is_one_line_on_stdout(capsys):
    print_result({"text": "two\nlines", "figure": math.inf}, as_json=True, lines=["not shown"])
    out, err = capsys.readouterr()
    assert out.count("\n") == 1 and json.loads(out) == {"text": "two\nlines", "figure": None} and err == ""


def test_a_reader_gets_the_lines(capsys):
    table = Table("column")
    table.add_row("cell")
    print_result({"hidden": 1}, as_json=False, lines=["first [not markup", table])
    out, _ = capsys.readouterr()
    assert "first [not markup" in out and "column" in out and "cell" in out and "hidden" not in out


def test_progress_is_shown_on_stderr_only(capsys):
    with progress() as on_step:
        for done in range(3):
            on_step("reading", done, 2)
        on_step("writing", 1, 4)
    out, err = capsys.readouterr()
    assert out == "" and "reading" in err and "2/2" in err and "1/4" in err


def test_without_a_terminal_a_stage_is_a_line_every_ten_seconds(capsys, monkeypatch):
    clock = iter([0.0, 4.0, 10.0, 19.0, 21.0, 22.0])
    monkeypatch.setattr("scripts.shared.console.time.monotonic", lambda: next(clock))
    with progress() as on_step:
        for done in range(1, 6):
            on_step("reading", done, 9)
        assert capsys.readouterr() == ("", "reading 3/9, 10 s\nreading 5/9, 21 s\n")
        on_step("writing", 1, None)
        assert capsys.readouterr() == ("", "")
    assert capsys.readouterr() == ("", "writing 1, 0 s\n")


def test_on_a_terminal_stages_are_bars(monkeypatch):
    terminal = io.StringIO()
    monkeypatch.setattr(console, "stderr", Console(file=terminal, force_terminal=True, width=100))
    with progress() as on_step:
        on_step("reading", 1, 2)
    assert "━" in terminal.getvalue() and "1/2" in terminal.getvalue()
    monkeypatch.setattr(console, "stderr", Console(file=terminal, force_terminal=True, width=100))
    with pytest.raises(RuntimeError), progress() as on_step:
        on_step("writing", 1, 4)
        raise RuntimeError
    assert terminal.getvalue().endswith("\x1b[1A\x1b[2K")


def test_the_precision_is_a_line_before_the_first_step_and_absent_without_one(capsys):
    with progress("bf16") as on_step:
        assert capsys.readouterr() == ("", "")
        on_step("reading", 0, 1)
        assert capsys.readouterr() == ("", "computing with bf16 weights\n")
        on_step("reading", 1, 1)
    assert capsys.readouterr() == ("", "reading 1/1, 0 s\n")
    with progress("bf16"):
        pass
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
def test_an_error_takes_the_bars_away(capsys, error):
    with pytest.raises(error), progress() as on_step:
        on_step("reading", 0, 2)
        raise error
    assert capsys.readouterr() == ("", "")


def test_libraries_are_quiet(tmp_path, capsys, tiny_llama_dir):
    from transformers import AutoModelForCausalLM

    quiet_libraries()
    AutoModelForCausalLM.from_pretrained(tiny_llama_dir).save_pretrained(tmp_path)
    assert capsys.readouterr() == ("", "")


def test_a_warning_is_one_line_on_stderr_and_the_old_way_returns(capsys):
    before = warnings.showwarning
    with warnings_as_lines():
        warnings.warn("first\nsecond", stacklevel=1)
    assert capsys.readouterr() == ("", "fedgraft: warning: first second\n")
    assert warnings.showwarning is before


def test_fields_of_a_message_are_shown_as_options():
    assert option_names("expected `n_prune` with `saliency`") == "expected --n-prune with --saliency"
