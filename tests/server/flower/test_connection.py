"""Connections as Flower's configuration names them, and health checks with and without TLS."""

from __future__ import annotations

import ssl
import threading
import tomllib
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
from flwr.cli.flower_config import parse_superlink_connection

from configs.errors import UserError
from server.flower.connection import Connection, add_connection, flower_home, read_connection
from server.flower.flower_process import free_ports
from tests.support.certificates import make_certificates

CONFIG = """
[superlink]
default = "lab"

[superlink.lab]
address = "lab.example.org:9093"
root-certificates = "{roots}"

[superlink.open]
address = "127.0.0.1:8000"
insecure = true

[superlink.ray]
address = ":local:"
"""


@pytest.fixture(scope="module")
def certificates(tmp_path_factory) -> tuple[Path, Path, Path]:
    return make_certificates(tmp_path_factory.mktemp("certificates"))


@pytest.fixture
def home(tmp_path, certificates) -> Path:
    (tmp_path / "config.toml").write_text(CONFIG.format(roots=certificates[0]))
    return tmp_path


def test_connections_are_read_by_name(home, certificates):
    assert read_connection("lab", home) == Connection("lab.example.org:9093", certificates[0])
    assert read_connection("", home) == read_connection("lab", home)
    assert read_connection("open", home) == Connection("127.0.0.1:8000", insecure=True)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("lap", "expected a SuperLink connection of .*lab, open, ray.*did you mean 'lab'"),
        ("ray", "use `fedgraft simulate`"),
    ],
)
def test_other_connections_are_refused(home, name, message):
    with pytest.raises(UserError, match=message):
        read_connection(name, home)


def test_a_home_without_configuration_is_refused(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    assert flower_home() == tmp_path
    with pytest.raises(UserError, match="found no such file; write one"):
        read_connection("lab")
    (tmp_path / "config.toml").write_text("[superlink")
    with pytest.raises(UserError, match="cannot be read"):
        read_connection("lab")
    monkeypatch.delenv("FLWR_HOME")
    assert flower_home() == Path.home() / ".flwr"


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (("lab",), "host:port"),
        (("lab:0",), "host:port"),
        (("lab:70000",), "host:port"),
        (("https://lab:80",), "host:port"),
        (("lab:80", Path("/none.crt")), "found none at /none.crt"),
        (("lab:80", Path("/none.crt"), True), "got both"),
    ],
)
def test_impossible_connections_are_refused(values, message):
    with pytest.raises(UserError, match=message):
        Connection(*values)


def test_a_connection_is_built_from_its_settings(certificates, monkeypatch):
    for connection in (
        Connection("127.0.0.1:1", insecure=True),
        Connection("a.org:2", certificates[0]),
        Connection("b.org:3"),
    ):
        assert Connection.of_settings(connection.settings()) == connection
    monkeypatch.chdir(certificates[0].parent)
    settings = {"address": "a.org:2", "root-certificates": certificates[0].name}
    assert Connection.of_settings(settings) == Connection("a.org:2", certificates[0])
    with pytest.raises(UserError, match="host:port, got ''"):
        Connection.of_settings({})


def test_a_written_connection_is_what_flower_reads(tmp_path, certificates):
    for connection in (Connection("127.0.0.1:1", insecure=True), Connection("[::1]:2", certificates[0])):
        connection.write(tmp_path / "home")
        config = tomllib.loads((tmp_path / "home" / "config.toml").read_text())["superlink"]
        read = parse_superlink_connection(config[config["default"]], config["default"])
        assert read_connection("", tmp_path / "home") == connection
        assert (read.address, read.insecure) == (connection.address, connection.insecure)
        assert connection.is_loopback
    assert not Connection("lab.example.org:1").is_loopback


def test_a_connection_is_added_beside_others(home, certificates):
    lab = read_connection("lab", home)
    for connection in (Connection("new.org:1", certificates[0]), Connection("127.0.0.1:1", insecure=True)):
        assert add_connection("new", connection, home) == home / "config.toml"
        assert read_connection("new", home) == connection
    assert read_connection("", home) == read_connection("lab", home) == lab
    before = (home / "config.toml").stat().st_mtime_ns
    add_connection("new", connection, home)
    assert (home / "config.toml").stat().st_mtime_ns == before
    add_connection("first", connection, home / "fresh")
    assert read_connection("", home / "fresh") == connection
    with pytest.raises(UserError, match="letters, digits"):
        add_connection("default", connection, home)


class Healthy(BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        self.send_response(200 if self.path == "/health" else 404)
        self.end_headers()

    def log_message(self, *arguments: object) -> None:
        pass


class QuietServer(ThreadingHTTPServer):
    def handle_error(self, *arguments: object) -> None:
        pass


@contextmanager
def server(certificate: Path | None = None, key: Path | None = None) -> Iterator[str]:
    """Address of a server that is healthy, with TLS if it has a certificate."""
    httpd = QuietServer(("127.0.0.1", 0), Healthy)
    if certificate is not None:
        context = ssl.SSLContext(ssl.PROTOCOL_TLS_SERVER)
        context.load_cert_chain(certificate, key)
        httpd.socket = context.wrap_socket(httpd.socket, server_side=True)
    threading.Thread(target=httpd.serve_forever, args=(0.05,), daemon=True).start()
    yield f"127.0.0.1:{httpd.server_port}"
    httpd.shutdown()
    httpd.server_close()


def test_health_with_the_right_settings(certificates):
    ca, certificate, key = certificates
    with server(certificate, key) as address:
        assert Connection(address, ca).is_healthy()
    with server() as address:
        assert Connection(address, insecure=True).is_healthy()
    assert not Connection(f"127.0.0.1:{free_ports(1)[0]}", insecure=True).is_healthy()


def test_other_tls_settings_are_refused_in_one_line(tmp_path, certificates):
    ca, certificate, key = certificates
    other, *_ = make_certificates(tmp_path / "other", host="DNS:elsewhere.org")
    with server(certificate, key) as address:
        with pytest.raises(UserError, match="name its `root_certificates`"):
            Connection(address, insecure=True).is_healthy()
        for wrong in (Connection(address, other), Connection(address)):
            with pytest.raises(UserError, match="vouch for, got one that fails"):
                wrong.is_healthy()
    with server() as address, pytest.raises(UserError, match="expected TLS at"):
        Connection(address, ca).is_healthy()
    _, elsewhere, its_key = make_certificates(tmp_path / "elsewhere", host="DNS:elsewhere.org")
    with server(elsewhere, its_key) as address, pytest.raises(UserError, match="vouch for"):
        Connection(address, tmp_path / "elsewhere" / "ca.crt").is_healthy()
    (tmp_path / "no.crt").write_text("nothing")
    with pytest.raises(UserError, match="cannot be read"):
        Connection("127.0.0.1:1", tmp_path / "no.crt").is_healthy()
