from __future__ import annotations

import pytest

from server.reporting.summary import SUMMARY_FILE, clear_summary, model_line, read_summary, write_summary


def test_a_summary_is_read_as_it_was_written_and_removed(tmp_path):
    write_summary(tmp_path, {"rounds": 2, "best": None})
    assert read_summary(tmp_path) == {"rounds": 2, "best": None}
    clear_summary(tmp_path)
    clear_summary(tmp_path)
    assert list(tmp_path.iterdir()) == []
    with pytest.raises(FileNotFoundError):
        read_summary(tmp_path)


def test_a_number_that_is_not_finite_is_not_written(tmp_path):
    with pytest.raises(ValueError, match="JSON compliant"):
        write_summary(tmp_path, {"perplexity": float("nan")})
    assert not (tmp_path / SUMMARY_FILE).exists()


def test_a_model_has_round_perplexity_and_folder_in_one_line():
    entry = {"round": 3, "perplexity": 2.7561, "out": "/best"}
    assert model_line("best", entry, digits=3) == "best model: round 3, perplexity 2.756, in /best"
    assert (
        model_line("last", {"round": 4, "perplexity": None}, digits=2)
        == "last model: round 4, perplexity unknown"
    )
