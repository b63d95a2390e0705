from __future__ import annotations

import os
import shutil
import time
from pathlib import Path

import pytest

from clients.state import cache_pruning
from clients.state.cache_pruning import prune_cache
from configs.schema import RunConfig
from tests.support.tiny_federation import node_of

DAY = 86_400


def make(folder: Path, *, days: float) -> Path:
    """A folder with a file that was last used so many days ago."""
    file = folder / "client-0" / "global.safetensors"
    file.parent.mkdir(parents=True)
    file.touch()
    make_used(folder, days)
    return folder


def make_used(folder: Path, days: float) -> None:
    """Set the last use of a folder to so many days ago."""
    used = time.time() - days * DAY
    for path in (*folder.rglob("*"), folder):
        os.utime(path, (used, used))


def test_runs_and_graphs_of_a_cache_folder_that_were_not_used_are_removed(tmp_path):
    old = [make(tmp_path / name, days=31) for name in ("run-1", "run-2", "graphs/aa")]
    kept = [make(tmp_path / name, days=29) for name in ("run-3", "graphs/bb")]
    kept += [make(tmp_path / name, days=99) for name in ("mine", "fingerprints")]
    in_use = make(tmp_path / "run-4", days=99)
    os.utime(in_use / "client-0" / "global.safetensors")
    prune_cache(RunConfig(), node_of({"cache-dir": str(tmp_path)}), run_id=7)
    assert not any(path.exists() for path in old) and all(path.exists() for path in [*kept, in_use])


@pytest.mark.parametrize("days, kept", [(0, True), (7, False), (30, True)])
def test_the_number_of_days_is_the_node_s_and_zero_keeps_all(tmp_path, days, kept):
    folder = make(tmp_path / "run-1", days=8)
    prune_cache(RunConfig(), node_of({"cache-dir": str(tmp_path), "cache-days": days}), run_id=7)
    assert folder.exists() is kept


def test_a_run_with_files_removes_nothing(tmp_path):
    """Its own first message has done so; a continued run that rested for long keeps its files."""
    folders = [make(tmp_path / name, days=99) for name in ("run-1", "run-7")]
    prune_cache(RunConfig(), node_of({"cache-dir": str(tmp_path)}), run_id=7)
    assert all(folder.exists() for folder in folders)


def test_in_the_user_s_cache_client_files_of_all_runs_are_found_and_their_logs_are_kept(
    tmp_path, monkeypatch
):
    monkeypatch.setenv("FEDGRAFT_CACHE", str(tmp_path))
    client, logs = make(tmp_path / "runs/1/clients/run-1", days=99), make(tmp_path / "runs/1/state", days=99)
    mine = make(tmp_path / "elsewhere/clients/run-1", days=99)
    prune_cache(RunConfig(log_dir=str(tmp_path.parent / "logs")), node_of(), run_id=7)
    assert client.exists()
    prune_cache(RunConfig(), node_of(), run_id=7)
    assert not client.exists() and logs.exists() and mine.exists()


def test_a_folder_that_another_client_removes_at_the_same_time_is_left_to_it(tmp_path, monkeypatch):
    folder = make(tmp_path / "run-1", days=99)

    def removed_meanwhile(path):
        shutil.rmtree(path)
        return cache_pruning.original(path)

    monkeypatch.setattr(cache_pruning, "original", cache_pruning._last_use, raising=False)
    monkeypatch.setattr(cache_pruning, "_last_use", removed_meanwhile)
    prune_cache(RunConfig(), node_of({"cache-dir": str(tmp_path)}), run_id=7)
    assert not folder.exists()


def test_the_longest_unused_folders_above_the_size_limit_are_removed(tmp_path):
    folders = {}
    for days, name in enumerate(("run-1", "graphs/aa", "run-2", "run-3")):
        folders[name] = make(tmp_path / name, days=days)
        (folders[name] / "client-0" / "global.safetensors").write_bytes(bytes(2**19))
        make_used(folders[name], days)
    node = node_of({"cache-dir": str(tmp_path), "cache-mb": 1, "cache-days": 0})
    prune_cache(RunConfig(), node, run_id=7)
    assert [name for name, folder in folders.items() if folder.exists()] == ["run-1", "graphs/aa"]
