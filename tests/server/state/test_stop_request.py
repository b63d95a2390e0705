from __future__ import annotations

from server.state.stop_request import clear_stop, request_stop, stop_requested


def test_a_request_lasts_until_it_is_withdrawn(tmp_path):
    clear_stop(tmp_path)
    assert not stop_requested(tmp_path)
    request_stop(tmp_path)
    request_stop(tmp_path)
    assert stop_requested(tmp_path) and not stop_requested(tmp_path / "absent")
    clear_stop(tmp_path)
    assert not stop_requested(tmp_path)
