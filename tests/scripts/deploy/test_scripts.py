"""Help, bad input and files of the deployment scripts; units and compose file. Flower is not started."""

from __future__ import annotations

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml

from configs.node_config import load_node_config
from configs.values import parse_assignments
from server.flower.flower_process import without_loopback_proxy
from tests.support.command import tree
from tests.support.paths import ROOT

DEPLOY = ROOT / "scripts" / "deploy"
UNITS = sorted((DEPLOY / "systemd").glob("*.service"))


def script(name: str, *arguments: object, home: Path) -> subprocess.CompletedProcess[str]:
    environment = {"PATH": "/usr/bin:/bin", "HOME": str(home), "PYTHON": sys.executable}
    command = [str(DEPLOY / name), *map(str, arguments)]
    return subprocess.run(command, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize("name", ["certificates.sh", "superexec.sh", "superlink.sh", "supernode.sh"])
def test_help_names_every_option(tmp_path, name):
    result = script(name, "--help", home=tmp_path)
    assert (result.returncode, result.stderr) == (0, "")
    source = (DEPLOY / name).read_text()
    body = source[source.index("set -euo") :]
    options = {
        word for line in body.splitlines() if line.strip().startswith("--") for word in line.split()[:1]
    }
    names = {option.rstrip(")") for option in options} or {
        "authority",
        "server",
        "node",
        "register",
        "connection",
    }
    assert [option for option in names if option not in result.stdout] == []
    assert tree(tmp_path) == {}


@pytest.mark.parametrize(
    ("name", "arguments", "message"),
    [
        ("superlink.sh", [], "expected --certificates"),
        ("superlink.sh", ["--host", "0.0.0.0", "--insecure"], "expected a loopback --host with --insecure"),
        ("superlink.sh", ["--certificates"], "expected a value after --certificates"),
        ("superlink.sh", ["--certificates=none"], "expected a readable"),
        ("superlink.sh", ["--insecure", "--port=x"], "expected --port as a number"),
        ("superlink.sh", ["--insecure", "--isolation=thread"], "expected --isolation process or subprocess"),
        ("superexec.sh", [], "expected --superlink"),
        ("superexec.sh", ["--superlink", "hub:1", "--insecure"], "expected a --superlink on loopback"),
        ("superexec.sh", ["--superlink=hub:1"], "expected --root-certificates"),
        ("superlink.sh", ["--ports=1"], "expected an option of --help, got '--ports'"),
        ("supernode.sh", [], "expected --superlink"),
        ("supernode.sh", ["--superlink", "hub:1", "--insecure"], "expected a --superlink on loopback"),
        ("supernode.sh", ["--superlink=hub:1"], "expected --root-certificates"),
        ("supernode.sh", ["--superlink=127.0.0.1:1", "--insecure", "--key=none"], "expected --key"),
        ("supernode.sh", ["--superlink=127.0.0.1:1", "--insecure", "partition-id=0", "density=2"], "density"),
        ("certificates.sh", [], "expected authority, server"),
        ("certificates.sh", ["server", "none", "hub"], "run certificates.sh authority"),
        ("certificates.sh", ["node", "keys", "../x"], "expected: certificates.sh node"),
    ],
)
def test_bad_input_is_one_line_and_leaves_nothing(tmp_path, name, arguments, message):
    result = script(name, *arguments, home=tmp_path)
    assert (result.returncode, result.stdout) == (2, "")
    assert message in result.stderr and len(result.stderr.splitlines()) == 1
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


LOOPBACK = "127.0.0.1,localhost,::1"


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ({}, {"no_proxy": LOOPBACK, "NO_PROXY": LOOPBACK, "no_grpc_proxy": "unset"}),
        (
            {"NO_PROXY": "a.org", "no_grpc_proxy": "b.org"},
            dict.fromkeys(("no_proxy", "NO_PROXY"), f"a.org,{LOOPBACK}")
            | {"no_grpc_proxy": f"b.org,{LOOPBACK}"},
        ),
        (
            {"no_grpc_proxy": ""},
            {"no_proxy": LOOPBACK, "NO_PROXY": LOOPBACK, "no_grpc_proxy": LOOPBACK},
        ),
    ],
)
def test_a_proxy_does_not_receive_connections_over_loopback(before, after):
    names = ("no_proxy", "NO_PROXY", "no_grpc_proxy")
    shown = "\n".join(f'echo "{name} ${{{name}-unset}}"' for name in names)
    code = f"set -euo pipefail\nsource '{DEPLOY / 'common.sh'}'\nflower_environment\n{shown}"
    environment = {"PATH": "/usr/bin:/bin", "PYTHON": sys.executable} | before
    result = subprocess.run(["bash", "-c", code], env=environment, capture_output=True, text=True, check=True)
    assert dict(line.split(" ", 1) for line in result.stdout.splitlines()) == after
    # As the environment of the processes that Python starts.
    expected = without_loopback_proxy(before)
    assert {name: expected.get(name, "unset") for name in names} == after


def test_a_private_key_that_others_can_read_is_refused(tmp_path):
    key = tmp_path / "key"
    key.touch(mode=0o644)
    result = script("supernode.sh", "--superlink=127.0.0.1:1", "--insecure", f"--key={key}", home=tmp_path)
    assert result.returncode == 2 and "chmod 600" in result.stderr


def openssl(*arguments: object) -> str:
    return subprocess.run(
        ["openssl", *map(str, arguments)], capture_output=True, text=True, check=True
    ).stdout


def test_certificates_are_signed_for_their_names_and_kept(tmp_path):
    keys = tmp_path / "keys"
    for word in ("made", "kept"):
        assert script("certificates.sh", "authority", keys, home=tmp_path).stdout.startswith(word)
        result = script("certificates.sh", "server", keys, "hub.example.org", "10.0.0.5", home=tmp_path)
        assert result.stdout.startswith(word), result.stderr
        assert script("certificates.sh", "node", keys, "site-0", home=tmp_path).stdout.startswith(word)
    assert openssl("verify", "-x509_strict", "-CAfile", keys / "ca.crt", keys / "server.pem").endswith("OK\n")
    text = openssl("x509", "-in", keys / "server.pem", "-noout", "-text")
    assert "DNS:localhost, IP Address:127.0.0.1, DNS:hub.example.org, IP Address:10.0.0.5" in text
    assert "CA:FALSE" in text and "secp384r1" in text
    assert (keys / "site-0.pub").read_text().startswith("ecdsa-sha2-nistp384 ")
    former = (keys / "server.pem").read_bytes()
    assert script("certificates.sh", "server", keys, "other.org", home=tmp_path).stdout.startswith("made")
    assert (keys / "server.pem").read_bytes() != former


def test_a_certificate_is_renewed_before_it_ends(tmp_path):
    script("certificates.sh", "authority", tmp_path, home=tmp_path)
    command = ["env", "DAYS=29", str(DEPLOY / "certificates.sh"), "server", str(tmp_path), "hub"]
    for _ in range(2):
        result = subprocess.run(command, capture_output=True, text=True, timeout=60)
        assert result.stdout.startswith("made"), result
    assert script("certificates.sh", "server", tmp_path, "hub", home=tmp_path).stdout.startswith("made")
    assert script("certificates.sh", "server", tmp_path, "hub", home=tmp_path).stdout.startswith("kept")


def test_half_an_authority_is_refused(tmp_path):
    (tmp_path / "ca.crt").touch()
    result = script("certificates.sh", "authority", tmp_path, home=tmp_path)
    assert result.returncode == 2 and "got one of them" in result.stderr


@pytest.mark.parametrize("unit", UNITS, ids=lambda path: path.name)
def test_a_unit_starts_a_script_as_an_own_user(unit):
    lines = unit.read_text().splitlines()
    settings = dict(line.split("=", 1) for line in lines if "=" in line and not line.startswith("#"))
    program = settings["ExecStart"].split()[1].removeprefix("/opt/fedgraft/")
    assert (ROOT / program).is_file() and "--detach" not in settings["ExecStart"]
    assert settings["User"] == "fedgraft" and settings["ProtectSystem"] == "strict"
    assert settings["ExecStart"].split()[3].startswith("/var/lib/" + settings["StateDirectory"])
    if shutil.which("systemd-analyze"):
        check = ["systemd-analyze", "verify", str(unit)]
        result = subprocess.run(check, capture_output=True, text=True, timeout=60)
        assert (result.returncode, result.stderr) == (0, "")


def test_the_compose_file_keeps_the_control_api_inside():
    assert len(UNITS) == 3
    content = yaml.safe_load((DEPLOY / "compose.yaml").read_text())
    assert set(content["services"]) == {"superlink", "supernode"}
    for service in content["services"].values():
        assert "ports" not in service and service["read_only"] and service["cap_drop"] == ["ALL"]
        program, *arguments = service["command"]
        source = (ROOT / program.removeprefix("/opt/fedgraft/")).read_text()
        options = {each.split("=")[0] for each in arguments if each.startswith("--")}
        assert [option for option in options if f"{option})" not in source] == []
        assert set(service["networks"]) <= set(content["networks"])
        volumes = {each.split(":")[0] for each in service["volumes"] if each[0] != "$"}
        assert volumes <= set(content["volumes"])
    node = [each for each in content["services"]["supernode"]["command"] if each[0] not in "-/"]
    assert load_node_config(parse_assignments(node)).data_dir == "/data"
