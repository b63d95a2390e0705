from __future__ import annotations

import pytest

from configs.errors import UserError
from server.flower.connection import Connection
from server.flower.submission import Submission, read_submission


def test_a_record_is_read_as_it_was_written(tmp_path):
    assert read_submission(tmp_path) is None
    roots = tmp_path / "ca.crt"
    roots.touch()
    for connection in (Connection("a.org:1", roots), Connection("127.0.0.1:2", insecure=True)):
        submission = Submission("17", connection, {"num-rounds": 3}, "/out", "host:/folder")
        submission.write(tmp_path / "logs")
        assert read_submission(tmp_path / "logs") == submission


@pytest.mark.parametrize("content", ["", "[]", "{}", '{"connection": {}}'])
def test_a_damaged_record_is_refused(tmp_path, content):
    (tmp_path / "submission.json").write_text(content)
    with pytest.raises(UserError, match="submission.json, which cannot be read"):
        read_submission(tmp_path)


def test_a_record_whose_certificates_are_gone_names_them(tmp_path):
    roots = tmp_path / "ca.crt"
    roots.touch()
    Submission("17", Connection("a.org:1", roots), {}).write(tmp_path)
    roots.unlink()
    with pytest.raises(UserError, match=f"submission.json, .*found none at {roots}"):
        read_submission(tmp_path)
