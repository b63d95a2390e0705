from __future__ import annotations

from pathlib import Path

import pytest

from configs.errors import UserError
from configs.paths import cache_folder, default_graph, graph_or_default


@pytest.fixture(autouse=True)
def _home(monkeypatch, tmp_path):
    for name in ("FEDGRAFT_CACHE", "XDG_CACHE_HOME"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("HOME", str(tmp_path / "home"))
    monkeypatch.chdir(tmp_path)


def test_the_cache_lies_in_the_users_cache_folder(tmp_path):
    assert cache_folder() == tmp_path / "home" / ".cache" / "fedgraft"
    assert not cache_folder().exists()


def test_the_users_cache_folder_may_be_elsewhere(monkeypatch, tmp_path):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert cache_folder() == tmp_path / "xdg" / "fedgraft"
    monkeypatch.setenv("XDG_CACHE_HOME", "")
    assert cache_folder() == tmp_path / "home" / ".cache" / "fedgraft"


@pytest.mark.parametrize(("given", "expected"), [("~/here", "home/here"), ("sub/folder", "sub/folder")])
def test_our_own_variable_wins(monkeypatch, tmp_path, given, expected):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    monkeypatch.setenv("FEDGRAFT_CACHE", given)
    assert cache_folder() == tmp_path / expected


def test_the_default_graph_lies_in_the_cache():
    assert default_graph() == cache_folder() / "graph"
    assert isinstance(default_graph(), Path)


def test_a_run_without_a_graph_takes_the_quick_starts_or_is_told_how_to_get_one(monkeypatch, tmp_path):
    monkeypatch.setenv("FEDGRAFT_CACHE", str(tmp_path))
    assert graph_or_default("/models/graph") == "/models/graph"
    with pytest.raises(
        UserError, match="expected a graph, got none named .* run scripts/quickstart.sh first"
    ):
        graph_or_default("")
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "config.json").touch()
    assert graph_or_default("") == str(tmp_path / "graph")
