"""The console during a run: a plain line per round, a live table on a terminal, both from the log alone."""

from __future__ import annotations

import io
import threading
import time
from dataclasses import asdict, replace

import pytest
from rich.console import Console

from server.reporting.live_table import follow_run, following, round_line, rounds_table
from server.reporting.run_log import RewireRecord, read_rounds
from tests.server.reporting.test_run_log import CLIENT, EDIT, ROUND, make_log


def console(*, terminal: bool) -> Console:
    return Console(file=io.StringIO(), force_terminal=terminal, width=140, color_system=None)


def finished_log(path):
    log = make_log(path)
    log.rewire(RewireRecord(round=1, rho_max=4, edits=[EDIT, EDIT]))
    log.round(ROUND)
    log.round(replace(ROUND, round=2, perplexity=None))


@pytest.mark.parametrize("terminal", [True, False])
def test_everything_logged_before_the_end_is_shown(tmp_path, terminal):
    finished_log(tmp_path)
    out = console(terminal=terminal)
    follow_run(tmp_path, is_finished=lambda: True, num_rounds=2, console=out)
    shown = out.file.getvalue()
    for fragment in (
        "2.5 s",
        "8.000",
        "9.500",
        "300 bytes",
        "80 bytes",
        "0.0500",
        "recipes",
        "prose",
        "3.500",
    ):
        assert fragment in shown


def test_plain_console_gets_one_line_a_round_as_rounds_come(tmp_path):
    out = console(terminal=False)
    log = make_log(tmp_path)
    with following(tmp_path, num_rounds=2, console=out):
        log.round(ROUND)
        deadline = time.monotonic() + 10
        while "round 1/2" not in out.file.getvalue() and time.monotonic() < deadline:
            time.sleep(0.02)
        first = out.file.getvalue()
        log.round(replace(ROUND, round=2))
    assert [line.split("  ")[0] for line in first.splitlines()] == ["round 1/2"]
    assert [line.split("  ")[0] for line in out.file.getvalue().splitlines()] == ["round 1/2", "round 2/2"]


def test_terminal_shows_which_round_is_under_way(tmp_path):
    out = console(terminal=True)
    make_log(tmp_path).round(ROUND)
    done = threading.Event()
    threading.Timer(0.8, done.set).start()
    follow_run(tmp_path, is_finished=done.is_set, num_rounds=3, console=out)
    assert "round 2 of 3  0:00" in out.file.getvalue()


@pytest.mark.parametrize("terminal", [True, False])
def test_a_run_that_stops_early_is_not_shown_as_under_way(tmp_path, terminal):
    out = console(terminal=terminal)
    make_log(tmp_path).round(replace(ROUND, stopped="no better"))
    done = threading.Event()
    threading.Timer(0.8, done.set).start()
    follow_run(tmp_path, is_finished=done.is_set, num_rounds=3, console=out)
    shown = out.file.getvalue()
    assert ("finishing after round 1 of 1" if terminal else "stopped early: no better") in shown
    assert "round 2" not in shown and shown.count("no better") <= 1


def test_following_ends_with_its_body_also_on_an_error(tmp_path):
    seen = []
    with pytest.raises(RuntimeError), following(tmp_path, num_rounds=1, console=console(terminal=True)):
        seen += [thread for thread in threading.enumerate() if thread.name == "follow-run"]
        raise RuntimeError
    assert [thread.is_alive() for thread in seen] == [False]


def test_table_has_a_column_per_client_and_the_edits_of_each_round(tmp_path):
    finished_log(tmp_path)
    table = rounds_table(read_rounds(tmp_path), {1: 2})
    headers = [str(column.header) for column in table.columns]
    cells = {header: list(column.cells) for header, column in zip(headers, table.columns, strict=True)}
    assert cells["round"] == ["1", "2"]
    assert cells["recipes"] == ["9.500", "9.500"]
    assert cells["perplexity"] == ["8.000", "-"]
    assert cells["edits"] == ["2", ""]
    assert cells["edges"] == ["11", "11"]


def test_many_clients_share_one_column_with_the_worst(tmp_path):
    clients = [replace(CLIENT, name=f"c{i}", perplexity=float(i)) for i in range(7)]
    make_log(tmp_path).round(replace(ROUND, clients=clients))
    table = rounds_table(read_rounds(tmp_path), {})
    columns = {str(column.header): list(column.cells) for column in table.columns}
    assert columns["worst"] == ["6.000"]
    assert "c0" not in columns


def test_a_name_is_no_markup(tmp_path):
    make_log(tmp_path).round(replace(ROUND, clients=[replace(CLIENT, name="[/red]x")]))
    out = console(terminal=True)
    follow_run(tmp_path, is_finished=lambda: True, num_rounds=1, console=out)
    assert "[/red]x" in out.file.getvalue()


def test_round_line_marks_what_is_unknown(tmp_path):
    unknown = replace(CLIENT, train_loss=None, perplexity=None)
    make_log(tmp_path).round(replace(ROUND, clients=[unknown], density=None, perplexity=123456.0))
    line = round_line(read_rounds(tmp_path)[0], num_rounds=9, edits=3)
    assert line.startswith("round 1/9  2.5 s  train loss -  perplexity 1.235e+05 (recipes -)")
    assert line.endswith("density -  edges 11  edits 3")


def test_epsilon_is_shown_where_there_is_a_guarantee(tmp_path):
    log = make_log(tmp_path)
    log.round(replace(ROUND, epsilon=1.25, delta=1e-5))
    row = read_rounds(tmp_path)[0]
    assert round_line(row, num_rounds=9, edits=3).endswith("edges 11  edits 3  epsilon 1.250")
    table = rounds_table([row], {})
    assert table.columns[-1].header == "epsilon" and list(table.columns[-1].cells) == ["1.250"]
    assert rounds_table([row | {"epsilon": None}], {}).columns[-1].header == "edits"


@pytest.mark.parametrize(
    ("count", "text"),
    [
        (0, "0 bytes"),
        (999, "999 bytes"),
        (1000, "1.0 kB"),
        (999_999, "1,000.0 kB"),
        (4_300_000, "4.3 MB"),
        (2 * 10**12, "2.0 TB"),
    ],
)
def test_bytes_have_decimal_units(count, text):
    line = round_line({**asdict(ROUND), "train_loss": 1.0, "bytes_up": count}, num_rounds=3, edits=None)
    assert f"  up {text}  down 80 bytes  " in line
