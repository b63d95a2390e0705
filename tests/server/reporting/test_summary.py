from __future__ import annotations

import pytest

from server.reporting.summary import SUMMARY_FILE, clear_summary, read_summary, write_summary


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
