from __future__ import annotations

import os

import pytest

from configs.errors import UserError
from ui.shared.workspace import Workspace


@pytest.fixture
def workspace(tmp_path) -> Workspace:
    for name in ("base", "runs/pruned", "runs/run/checkpoints/best", "runs/.hidden", "elsewhere"):
        (tmp_path / name).mkdir(parents=True)
        (tmp_path / name / "config.json").write_text("{}")
    for age, name in enumerate(("new", "old")):
        (tmp_path / "runs" / name).mkdir()
        (tmp_path / "runs" / name / "rounds.jsonl").write_text("")
        os.utime(tmp_path / "runs" / name / "rounds.jsonl", (1000 - age, 1000 - age))
    return Workspace(tmp_path / "base", tmp_path / "runs")


def test_models_are_the_base_and_the_checkpoints_below_the_folder_of_runs(workspace, tmp_path):
    names = ["base", "runs/pruned", "runs/run/checkpoints/best"]
    assert workspace.models() == [str(tmp_path / name) for name in names]
    assert workspace.known_model(workspace.models()[1]) == tmp_path / "runs/pruned"
    assert Workspace(None, tmp_path / "absent").models() == []


def test_runs_are_listed_latest_first(workspace, tmp_path):
    assert workspace.run_folders() == [str(tmp_path / "runs/new"), str(tmp_path / "runs/old")]
    assert workspace.known_run(str(tmp_path / "runs/old")) == tmp_path / "runs/old"


@pytest.mark.parametrize("path", [None, "", "/etc", "elsewhere"])
def test_folders_outside_of_the_lists_are_refused(workspace, tmp_path, path):
    path = path and str(tmp_path / path)
    with pytest.raises(UserError, match="expected a `model` of the list"):
        workspace.known_model(path)
    with pytest.raises(UserError, match="expected a `run` of the list"):
        workspace.known_run(path)


def test_a_new_folder_is_a_plain_name_that_is_not_taken(workspace, tmp_path):
    assert workspace.new_folder("smaller-2.b") == tmp_path / "runs/smaller-2.b"
    with pytest.raises(UserError, match="not taken"):
        workspace.new_folder("pruned")


@pytest.mark.parametrize("name", ["", None, "..", "../x", "/etc/x", "a/b", ".hidden", "a b", "x" * 65, "a\n"])
def test_names_with_a_path_are_refused(workspace, name):
    with pytest.raises(UserError, match="expected `name` of letters, digits"):
        workspace.new_folder(name)
