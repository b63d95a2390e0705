"""Results of a run from a folder that is mounted, or over SSH, which a shell script stands for."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from configs.errors import UserError
from server.flower.flower_process import RunFailed
from server.flower.server_folder import ServerFolder
from tests.support.command import tree

SSH = """#!/bin/sh
# ssh -o OPTION -o OPTION HOST COMMAND
echo "$5" >> "$(dirname "$0")/hosts"
eval "$6"
"""


@pytest.fixture
def remote(tmp_path, monkeypatch) -> Path:
    """Folder of a finished run, and a program in the place of ``ssh`` that reaches it."""
    program = tmp_path / "bin" / "ssh"
    program.parent.mkdir()
    program.write_text(SSH)
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{program.parent}:{os.environ['PATH']}")
    folder = tmp_path / "it's a run"
    for name in (
        "logs/state/noise.key",
        "logs/tensorboard/e",
        "logs/summary.json",
        "logs/server.lock",
        "model/w",
    ):
        (folder / name).parent.mkdir(parents=True, exist_ok=True)
        (folder / name).write_text(name)
    return folder


@pytest.mark.parametrize("host", ["", "me@lab.org:"])
def test_logs_and_model_are_copied_without_state_and_locks(tmp_path, remote, host):
    place, logs, out = ServerFolder.parse(f"{host}{remote}"), tmp_path / "logs", tmp_path / "out"
    for name in ("tensorboard/old", "kept"):
        (logs / name).parent.mkdir(parents=True, exist_ok=True)
        (logs / name).write_text("of mine")
    place.fetch_logs(logs)
    place.fetch_model(out, overwrite=False)
    assert tree(out) == {"w": b"model/w"}
    assert tree(logs) == {
        "kept": b"of mine",
        "summary.json": b"logs/summary.json",
        "tensorboard": None,
        "tensorboard/e": b"logs/tensorboard/e",
    }
    with pytest.raises(UserError, match="empty output directory"):
        place.fetch_model(out, overwrite=False)
    place.fetch_model(out, overwrite=True)
    if host:
        assert set((tmp_path / "bin" / "hosts").read_text().split()) == {"me@lab.org"}


@pytest.mark.parametrize("host", ["", "lab:"])
def test_the_end_of_a_run_is_requested_there(remote, host):
    ServerFolder.parse(f"{host}{remote}").request_stop()
    assert (remote / "logs" / "stop").exists()


@pytest.mark.parametrize("host", ["", "lab:"])
def test_a_missing_folder_is_a_failure_that_leaves_nothing(tmp_path, remote, host):
    place = ServerFolder.parse(f"{host}/no/such/folder")
    for act in (place.request_stop, lambda: place.fetch_model(tmp_path / "out", overwrite=False)):
        with pytest.raises(RunFailed, match="/no/such/folder"):
            act()
    assert not (tmp_path / "out").exists()


def test_links_out_of_the_archive_are_refused(tmp_path, remote):
    (remote / "model" / "link").symlink_to("/etc/passwd")
    with pytest.raises(RunFailed, match="cannot be used"):
        ServerFolder.parse(f"lab:{remote}").fetch_model(tmp_path / "out", overwrite=False)
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("place", ["folder", "lab:folder", "-oProxyCommand=x:/folder", "a b:/folder", ""])
def test_other_places_are_refused(place):
    with pytest.raises(UserError, match="with an absolute path"):
        ServerFolder.parse(place)
