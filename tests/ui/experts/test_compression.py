from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import UserError
from ui.experts.compression import job_arguments, result_text


def test_arguments_are_those_of_the_verb(tmp_path):
    paths = (Path("m"), Path("l.csv"), Path("o"))
    prune = ["--model", "m", "--expert-list", "l.csv", "--out", "o"]
    assert job_arguments("prune", *paths, equalize=True, data="") == ["prune", *prune, "--equalize"]
    merge = job_arguments("merge", *paths, equalize=False, data="wikimix")
    assert merge == ["merge", *prune, "--data", "wikimix"]
    with pytest.raises(UserError, match="prune or merge, got analyze"):
        job_arguments("analyze", *paths, equalize=False, data="")


def test_the_result_names_folder_sizes_perplexities_and_warnings():
    result = {
        "out": "o",
        "bytes_before": 2000,
        "bytes_after": 1500,
        "perplexity": {"before": 4.0, "merged": 5.25},
    }
    assert result_text(result, ["w"]) == (
        "Wrote o: 1,500 bytes, 75.0% of 2,000. Perplexity on held-out text: before 4.000, merged 5.250. Warning: w."
    )
