from __future__ import annotations

import stat

import pytest

from configs.errors import UserError
from server.privacy.noise_key import NOISE_KEY, create_noise_key, read_noise_key, remove_noise_key


def test_a_key_is_random_kept_for_its_owner_and_read_back(tmp_path):
    first = create_noise_key(tmp_path / "state")
    path = tmp_path / "state" / NOISE_KEY
    assert len(first) == 32 and read_noise_key(tmp_path / "state") == first
    assert stat.S_IMODE(path.stat().st_mode) == 0o600
    second = create_noise_key(tmp_path / "state")
    assert second != first and read_noise_key(tmp_path / "state") == second
    assert [each.name for each in path.parent.iterdir()] == [NOISE_KEY]


def test_a_leftover_of_a_killed_process_is_replaced(tmp_path):
    (tmp_path / f".{NOISE_KEY}.partial").write_bytes(b"half")
    assert len(create_noise_key(tmp_path)) == 32
    assert [each.name for each in tmp_path.iterdir()] == [NOISE_KEY]


@pytest.mark.parametrize("content", [None, b"", b"short"])
def test_without_a_whole_key_the_run_is_not_continued(tmp_path, content):
    if content is not None:
        (tmp_path / NOISE_KEY).write_bytes(content)
    with pytest.raises(UserError, match=f"got {len(content or b'')}; the run cannot be continued"):
        read_noise_key(tmp_path)


def test_a_removed_key_is_gone(tmp_path):
    create_noise_key(tmp_path)
    remove_noise_key(tmp_path)
    assert list(tmp_path.iterdir()) == []
    remove_noise_key(tmp_path)
