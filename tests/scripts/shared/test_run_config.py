"""Run configuration from a file and options."""

from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import UserError
from scripts.shared.run_config import read_node_values, read_run_config


def configured(place: Path, text: str, given: dict, assignments: list[str]):
    (place / "run.toml").write_text(text)
    return read_run_config(place / "run.toml", given, assignments)


def test_named_options_win_over_the_file_and_set_wins_over_all(tmp_path):
    text = "num-rounds = 7\ndensity = 0.25\nseed = 3\nrho-max = 9"
    run = configured(tmp_path, text, {"num-rounds": 8, "seed": 4, "budgets": None, "out": ""}, ["seed=5"])
    assert (run.rho_max, run.num_rounds, run.seed, run.density) == (9, 8, 5, 0.25)
    assert (run.local_steps, run.budgets, run.out) == (20, "", "")  # defaults
    assert read_run_config(None, {}, []).num_rounds == 3


def test_zero_is_a_value_and_not_the_lack_of_one(tmp_path):
    with pytest.raises(UserError, match="num-clients"):
        configured(tmp_path, "num-clients = 2", {"num-clients": 0}, [])


def test_an_unknown_key_of_the_file_is_refused_with_the_nearest(tmp_path):
    with pytest.raises(UserError, match="did you mean 'merge-every'"):
        configured(tmp_path, "merge-ever = 2", {}, [])


def test_paths_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    for name in ("auto", "wikimix", "graph"):
        (tmp_path / name).mkdir()
    (tmp_path / "form.json").write_text("{}")
    run = read_run_config(None, {"graph": "graph"}, ["out=a/b", "data=wikimix;graph;owner/name"])
    assert (run.graph, run.out) == (str(tmp_path / "graph"), str(tmp_path / "a" / "b"))
    assert run.data == f"wikimix;{tmp_path / 'graph'};owner/name"
    assert (run.template, run.log_dir) == ("auto", str(tmp_path / "logs" / "run"))
    assert read_run_config(None, {"graph": "owner/name"}, []).graph == "owner/name"
    assert read_run_config(None, {}, ["template=form.json"]).template == str(tmp_path / "form.json")


def test_existing_paths_of_a_node_become_absolute_and_names_stay(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "my graph").mkdir()
    assignments = ["partition-id=1", "graph=my graph", "base=owner/name", "data-dir=none", "density=0.5"]
    assert read_node_values(assignments) == {
        "partition-id": 1,
        "graph": str(tmp_path / "my graph"),
        "base": "owner/name",
        "data-dir": "none",
        "density": 0.5,
    }
    with pytest.raises(UserError, match="key=value"):
        read_node_values(["partition-id"])
