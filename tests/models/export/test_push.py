"""The hub's own client uploads to a stand-in; offline mode of the tests needs a process of its own."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from configs.errors import UserError
from models.export.push import check_pushable, push_folder
from tests.conftest import tiny_llama
from tests.models.export.hub_server import TOKEN, hub_server
from tests.support.paths import ROOT


@pytest.fixture
def folder(tmp_path):
    """Export with a card, a hidden file and an unfinished one."""
    tiny_llama().save_pretrained(tmp_path / "export")
    (tmp_path / "export" / "README.md").write_text("---\nlicense: mit\n---\n# x\n")
    (tmp_path / "export" / ".hidden").write_text("x")
    (tmp_path / "export" / "a.partial").write_text("x")
    return tmp_path / "export"


def push(url: str, folder, token: str = TOKEN, *more: str) -> subprocess.CompletedProcess:
    """``fedgraft push`` in a process that may use the network."""
    command = [
        sys.executable,
        "fedgraft.py",
        "push",
        "--folder",
        str(folder),
        "--repository",
        "me/tiny",
        *more,
    ]
    own = {"HF_HUB_OFFLINE": "0", "HF_TOKEN": token, "HF_ENDPOINT": url, "HF_HUB_DISABLE_XET": "1"}
    return subprocess.run(
        [*command, "--json"], cwd=ROOT, env=os.environ | own, capture_output=True, text=True, timeout=120
    )


def test_an_export_is_uploaded_byte_for_byte_and_again(folder):
    with hub_server() as hub:
        done = push(hub.url, folder)
        assert done.returncode == 0, done.stderr
        result = json.loads(done.stdout)
        assert result == {"repository": "me/tiny", "url": f"{hub.url}/me/tiny", "commit": f"{1:040x}"}
        names = {"README.md", "config.json", "generation_config.json", "model.safetensors"}
        assert hub.files["me/tiny"] == {name: (folder / name).read_bytes() for name in names}
        assert hub.repositories == {"me/tiny": True} and hub.messages == ["Upload export"]
        assert push(hub.url, folder).returncode == 0


def test_a_hub_that_refuses_is_one_line(folder):
    with hub_server() as hub:
        done = push(hub.url, folder, "wrong")
        assert done.returncode == 2 and hub.files == {}
        (line,) = done.stderr.strip().splitlines()
        assert "expected a hub that accepts me/tiny, got: " in line and "hf auth login" in line
    done = push("http://127.0.0.1:9", folder)
    assert done.returncode == 2 and "expected a hub that accepts me/tiny" in done.stderr


def test_without_network_nothing_is_sent(folder):
    with pytest.raises(UserError, match="expected a hub that accepts me/x"):
        push_folder(folder, "me/x", endpoint="http://127.0.0.1:9")


def test_a_folder_needs_weights_and_a_card(folder, tmp_path):
    check_pushable(folder)
    with pytest.raises(UserError, match="expected the folder of an export"):
        check_pushable(tmp_path / "absent")
    (folder / "README.md").unlink()
    with pytest.raises(UserError, match=r"expected a model card README\.md"):
        check_pushable(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(UserError, match="expected safetensors weights or a GGUF file"):
        check_pushable(folder)
