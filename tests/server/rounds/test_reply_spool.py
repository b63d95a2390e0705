from __future__ import annotations

import os

import pytest

from server.rounds.reply_spool import ReplySpool, remove_spools


def test_what_is_put_is_read_again_and_gone_after_the_block(tmp_path):
    with ReplySpool(tmp_path / "logs") as spool:
        kept = [spool.put(data) for data in (b"one", b"", b"one", os.urandom(5000))]
        assert [each.read()[:3] for each in kept[:3]] == [b"one", b"", b"one"]
        assert [each.size for each in kept] == [3, 0, 3, 5000]
        assert len({each.path for each in kept}) == 4
        assert os.listdir(tmp_path / "logs") == [spool.folder.name]
    assert os.listdir(tmp_path / "logs") == []


def test_an_error_leaves_nothing_behind(tmp_path):
    with pytest.raises(RuntimeError), ReplySpool(tmp_path) as spool:
        spool.put(b"x")
        raise RuntimeError("stop")
    spool.close()
    assert os.listdir(tmp_path) == []


def test_two_spools_of_one_folder_do_not_meet(tmp_path):
    with ReplySpool(tmp_path) as one, ReplySpool(tmp_path) as other:
        first, second = one.put(b"1"), other.put(b"2")
        assert (first.read(), second.read()) == (b"1", b"2")


def test_spools_of_killed_processes_are_removed_and_nothing_else(tmp_path):
    spool = ReplySpool(tmp_path)
    spool.put(b"x")
    (tmp_path / "replies.txt").touch()
    remove_spools(tmp_path)
    assert os.listdir(tmp_path) == ["replies.txt"]
    remove_spools(tmp_path / "absent")
