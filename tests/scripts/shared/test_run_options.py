from __future__ import annotations

from pathlib import Path

import pytest

from configs.choices import LossOn
from configs.errors import UserError
from scripts.shared.run_options import ConnectionOptions, RunOptions
from server.flower.connection import Connection


def test_options_of_a_run_are_keys_with_absolute_paths(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "graph").mkdir()
    options = RunOptions(graph="graph", data=["a"], loss_on=LossOn.ALL, log_dir=Path("logs"))
    given = {key: value for key, value in options.values().items() if value}
    assert given == {
        "graph": str(tmp_path / "graph"),
        "data": ["a"],
        "loss-on": "all",
        "log-dir": str(tmp_path / "logs"),
    }
    assert RunOptions(graph="/elsewhere/graph").values()["graph"] == "/elsewhere/graph"


def test_a_superlink_is_named_by_connection_address_or_default(tmp_path, monkeypatch):
    monkeypatch.setenv("FLWR_HOME", str(tmp_path))
    (tmp_path / "config.toml").write_text(
        '[superlink]\ndefault = "a"\n[superlink.a]\naddress = "a.org:1"\n[superlink.b]\naddress = "b.org:1"\n'
    )
    recorded = Connection("c.org:1")
    assert ConnectionOptions().read() == Connection("a.org:1")
    assert ConnectionOptions().read(recorded) == recorded
    assert ConnectionOptions(connection="b").read(recorded) == Connection("b.org:1")
    assert ConnectionOptions(superlink="d.org:1", insecure=True).read() == Connection(
        "d.org:1", insecure=True
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"superlink": "a:1", "connection": "b"}, "either --connection or --superlink"),
        ({"insecure": True}, "expected --superlink with"),
        ({"connection": "a", "root_certificates": Path("x")}, "expected --superlink with"),
    ],
)
def test_conflicting_options_are_refused(options, message):
    with pytest.raises(UserError, match=message):
        ConnectionOptions(**options).read()
