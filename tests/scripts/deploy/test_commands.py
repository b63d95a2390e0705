from __future__ import annotations

import subprocess
import sys
import tomllib
from pathlib import Path

from scripts.deploy import commands
from server.flower.connection import Connection, read_connection
from tests.support.certificates import make_certificates


def call(monkeypatch, *arguments: object) -> int:
    monkeypatch.setattr(sys, "argv", ["commands", *map(str, arguments)])
    return commands.main()


def test_as_many_ports_as_asked_are_printed(monkeypatch, capsys):
    assert call(monkeypatch, "ports", "3") == 0
    ports = [int(port) for port in capsys.readouterr().out.split()]
    assert len(set(ports)) == 3


def test_a_job_is_stopped(monkeypatch):
    stopped = []
    monkeypatch.setattr("scripts.deploy.commands.stop_job", lambda job: stopped.append(job))
    assert call(monkeypatch, "stop", "job") == 0
    assert stopped == ["job"]


def test_a_job_is_guarded(monkeypatch, tmp_path):
    process = subprocess.Popen([sys.executable, "-c", ""])
    (tmp_path / "work").mkdir()
    stopped = []
    monkeypatch.setattr("server.flower.guard.stop_job", stopped.append)
    assert call(monkeypatch, "guard", "job", process.pid, tmp_path / "work") == 0
    assert stopped == ["job"] and not (tmp_path / "work").exists()
    process.wait()


def test_health_is_the_exit_status(monkeypatch, tmp_path):
    seen = []

    def is_healthy(self: Connection) -> bool:
        seen.append(self)
        return self.insecure

    monkeypatch.setattr(Connection, "is_healthy", is_healthy)
    (tmp_path / "ca").touch()
    assert call(monkeypatch, "healthy", "a:1") == 0
    assert call(monkeypatch, "healthy", "a:1", tmp_path / "ca") == 1
    assert call(monkeypatch, "healthy", "a:1", tmp_path / "none") == 1
    assert seen == [Connection("a:1", insecure=True), Connection("a:1", tmp_path / "ca")]


def test_a_node_configuration_is_checked_and_written(monkeypatch, capsys, tmp_path):
    (tmp_path / "it's data").mkdir()
    monkeypatch.chdir(tmp_path)
    file = tmp_path / "node.toml"
    assert call(monkeypatch, "node-config", file, "partition-id=1", "data-dir=it's data", "density=0.5") == 0
    values = {"partition-id": 1, "data-dir": str(tmp_path / "it's data"), "density": 0.5}
    assert tomllib.loads(file.read_text()) == values
    for wrong, message in (
        ("partition-id=-1", "partition-id"),
        ("data-dri=x", "did you mean 'data-dir'"),
        ("x", "key=value"),
    ):
        assert call(monkeypatch, "node-config", tmp_path / "wrong.toml", "partition-id=1", wrong) == 2
        assert message in capsys.readouterr().err
    assert not (tmp_path / "wrong.toml").exists()


def test_keys_are_registered_once(monkeypatch, capsys, tmp_path):
    ca, *_ = make_certificates(tmp_path)
    known: set[Path] = set()

    def register(key: Path, **_: object) -> bool:
        added = key not in known
        known.add(key)
        return added

    monkeypatch.setattr("scripts.deploy.commands.register_node", register)
    monkeypatch.setattr("server.flower.deployed_run.wait_until_healthy", lambda connection, timeout: None)
    key = tmp_path / "site.pub"
    key.touch()
    for word in ("registered", "kept"):
        assert call(monkeypatch, "register", "127.0.0.1:1", ca, key) == 0
        assert capsys.readouterr().out == f"{word} {key}\n"
    assert call(monkeypatch, "register", "127.0.0.1:1", ca, tmp_path / "none.pub") == 2
    assert "found none at" in capsys.readouterr().err


def test_a_connection_is_named(monkeypatch, capsys, tmp_path):
    ca, *_ = make_certificates(tmp_path)
    monkeypatch.setenv("FLWR_HOME", str(tmp_path / "home"))
    assert call(monkeypatch, "connection", "lab", "hub.org:1", ca) == 0
    assert read_connection("lab") == Connection("hub.org:1", ca)
    assert "lab is hub.org:1" in capsys.readouterr().out
    assert call(monkeypatch, "connection", "a.b", "hub.org:1", ca) == 2
