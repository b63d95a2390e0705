from __future__ import annotations

import pytest

from configs.errors import UserError
from ui.shared import sessions as module
from ui.shared.sessions import Session, Sessions


class _Job:
    def __init__(self) -> None:
        self.running = self.canceled = False

    def start(self) -> None:
        self.running = True

    def cancel(self) -> None:
        self.running, self.canceled = False, True


def test_each_session_has_a_folder_of_its_own_which_goes_with_it(tmp_path):
    sessions = Sessions(tmp_path)
    one, other = sessions.get("a"), sessions.get("b")
    assert sessions.get("a") is one and one.folder != other.folder
    (one.folder / "x.csv").write_text("x")
    sessions.close("a")
    sessions.close("a")
    assert not one.folder.exists() and other.folder.exists() and sessions.get("a") is not one
    sessions.close_all()
    assert list(tmp_path.iterdir()) == []


def test_a_folder_of_one_name_replaces_the_earlier_one_under_a_new_path(tmp_path):
    session = Session(tmp_path)
    first, second = session.new_folder("list"), session.new_folder("list")
    assert first != second and list(tmp_path.iterdir()) == [second]


def test_the_end_of_a_session_removes_its_uploads_but_for_those_of_another(tmp_path, monkeypatch):
    sessions = Sessions(tmp_path)
    paths = [tmp_path / name / "x.npz" for name in ("own", "shared")]
    for path in paths:
        path.parent.mkdir()
        path.write_text("x")
    sessions.get("a").uploads |= set(paths) | {tmp_path / "gone" / "x.npz"}
    sessions.get("b").uploads.add(paths[1])
    monkeypatch.setattr(module, "UPLOAD_SECONDS", 0)
    sessions.close("a")
    assert [path.exists() for path in paths] == [False, True]
    sessions.close("b")
    assert not paths[1].exists()


def test_an_upload_that_another_session_may_be_about_to_read_stays(tmp_path):
    sessions = Sessions(tmp_path)
    path = tmp_path / "x.npz"
    path.write_text("x")
    sessions.get("a").uploads.add(path)
    sessions.close("a")
    assert path.exists()


def test_a_session_runs_one_job_at_a_time_and_cancels_it_at_its_end(tmp_path):
    sessions = Sessions(tmp_path)
    session, job = sessions.get("a"), _Job()
    session.start(job)
    with pytest.raises(UserError, match="one job at a time"):
        session.start(_Job())
    sessions.close("a")
    assert job.canceled
