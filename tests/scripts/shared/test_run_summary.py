from __future__ import annotations

import pytest

from scripts.shared.console import print_result
from scripts.shared.run_summary import summary_lines
from tests.support.run_summaries import SUMMARY


def shown(capsys, summary: dict) -> str:
    capsys.readouterr()
    print_result({}, as_json=False, lines=summary_lines(summary))
    return capsys.readouterr().out


@pytest.mark.parametrize(
    "words", ["letters", "9.50", "4.25", "2.0 kB", "10.0 kB (5 times less)", "edits: 3", "/out", "/logs"]
)
def test_a_table_of_clients_then_bytes_edits_and_paths(capsys, words):
    assert words in shown(capsys, SUMMARY)


def test_without_a_model_its_line_is_left_out():
    assert summary_lines({**SUMMARY, "out": ""})[1:] == summary_lines(SUMMARY)[1:-1]


@pytest.mark.parametrize(
    ("changes", "lines"),
    [
        ({}, ["last model: round 2, perplexity 4.25", "best model: round 1, perplexity 4.12, in /b"]),
        ({"last": {"round": 2, "perplexity": None}}, ["last model: round 2, perplexity unknown"]),
        ({"best": None}, ["last model: round 2, perplexity 4.25"]),
    ],
)
def test_last_and_best_model_have_a_line(changes, lines):
    found = [line for line in summary_lines(SUMMARY | changes)[1:] if " model: round" in line]
    assert found[: len(lines)] == lines and len(found) == 2 - (changes.get("best", 1) is None)


def test_the_reason_of_an_early_end_has_a_line():
    assert "stopped after round 2: no better" in summary_lines({**SUMMARY, "stopped": "no better"})


def test_unknown_figures_are_dashes_and_the_reason_of_a_refusal_has_a_line(capsys):
    unused = dict.fromkeys(SUMMARY["clients"][0]) | {"name": "node-7", "refused": "disk full"}
    text = shown(capsys, SUMMARY | {"clients": [unused]})
    assert "no update of node-7 was used: disk full" in text
    assert [cell.strip() for cell in text.splitlines()[4].strip("│ ").split("│")] == ["node-7", *"----"]


def test_rounds_of_drift_have_one_line():
    first = SUMMARY["clients"][0] | {"drift_rounds": [2, 4, 5, 6]}
    summary = SUMMARY | {"clients": [first, first | {"name": "digits", "drift_rounds": [7]}]}
    expected = "drift: letters in rounds 2, 4-6, digits in rounds 7; the federation in "
    assert expected + "none" in summary_lines(summary)
    assert expected + "rounds 5-6" in summary_lines(summary | {"drift_rounds": [5, 6]})
    many = [first | {"name": str(index)} for index in range(9)]
    assert "drift: 9 clients; the federation in none" in summary_lines(SUMMARY | {"clients": many})


def test_names_and_reasons_are_shown_as_they_are(capsys):
    """Text in square brackets is markup of the console library, an end tag without a start an error."""
    client = SUMMARY["clients"][0] | {"name": "[/red]a", "refused": "[/blue] b"}
    text = shown(capsys, {**SUMMARY, "clients": [client], "stopped": "[/c]", "out": "/out/[/d]"})
    assert all(part in text for part in ("[/red]a", "[/blue] b", "[/c]", "/out/[/d]"))


def test_log_files_that_are_incomplete_are_named():
    lines = summary_lines(SUMMARY | {"log_errors": {"rounds.jsonl": "OSError: disk full"}})
    assert "the log file rounds.jsonl is incomplete: OSError: disk full" in lines


def test_epsilon_has_a_line_where_there_is_a_guarantee():
    line = "differential privacy of each client: epsilon 7.935 at delta 1e-05"
    assert line in summary_lines(SUMMARY | {"epsilon": 7.93461, "delta": 1e-5})
    assert summary_lines(SUMMARY | {"epsilon": None, "delta": None})[1:] == summary_lines(SUMMARY)[1:]
