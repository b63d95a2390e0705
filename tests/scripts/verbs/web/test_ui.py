from __future__ import annotations

import pytest

from scripts.verbs.web import ui as module
from tests.support.command import assert_refused, run


def test_a_folder_without_a_model_is_refused(capsys, tmp_path):
    assert_refused(
        run(capsys, "ui", "--model", tmp_path), "--model", str(tmp_path), "config.json", as_json=False
    )


def test_a_missing_library_is_named_with_its_extra(capsys, monkeypatch):
    monkeypatch.setattr(module, "find_spec", lambda name: None)
    assert_refused(run(capsys, "ui"), "gradio", "bash scripts/install.sh ui", as_json=False)


def test_the_address_is_printed_and_the_page_ends_with_ctrl_c(capsys, monkeypatch, tmp_path):
    def interrupted(event) -> None:
        raise KeyboardInterrupt

    monkeypatch.setattr(module.threading.Event, "wait", interrupted)
    monkeypatch.setattr("ui.serve.serving", _Serving)
    outcome = run(capsys, "ui", "--runs", tmp_path, "--port", "7")
    assert outcome.code == 130 and "http://127.0.0.1:7/" in outcome.err
    assert _Serving.seen == [(None, tmp_path, 7), "closed"]


class _Serving:
    seen: list = []

    def __init__(self, model, runs, *, port) -> None:
        self.seen.append((model, runs, port))

    def __enter__(self) -> str:
        return f"http://127.0.0.1:{self.seen[0][2]}/"

    def __exit__(self, *error) -> None:
        self.seen.append("closed")


@pytest.fixture(autouse=True)
def _nothing_seen():
    _Serving.seen.clear()
