from __future__ import annotations

import pytest

from server.flower.connection import Connection
from tests.support.command import assert_refused, run
from tests.support.tiny_federation import write_texts

SETTINGS = ("--set", "block-size=32", "--set", "local-steps=2", "--set", "precision=fp32")


@pytest.fixture
def node(tmp_path, monkeypatch, tiny_graph_dir) -> list[str]:
    monkeypatch.chdir(tmp_path)
    write_texts(tmp_path / "private", ["letters"])
    return ["partition-id=1", f"graph={tiny_graph_dir}", "data-dir=private", "cache-dir=cache"]


def test_a_site_is_checked_with_its_connection(node, capsys, monkeypatch):
    monkeypatch.setattr(Connection, "is_healthy", lambda self: True)
    outcome = run(capsys, "check-node", *node, *SETTINGS, "--superlink=127.0.0.1:1", "--insecure", "--json")
    result = outcome.json()
    assert (outcome.code, result["ok"]) == (0, True)
    assert [each["name"] for each in result["checks"]] == [
        "connection",
        "graph",
        "data",
        "disk",
        "memory",
        "round",
    ]
    assert set(result["round"]) == {"seconds", "bytes_up", "bytes_down", "memory_mb"}
    assert "127.0.0.1:1 without TLS" in outcome.err and result["fingerprint"] in outcome.err


def test_what_does_not_fit_is_the_exit_code_and_says_how_to_fix_it(node, capsys):
    outcome = run(
        capsys,
        "check-node",
        *node,
        *SETTINGS,
        "memory-budget-mb=1",
        "--superlink=127.0.0.1:1",
        "--root-certificates=none",
    )
    assert outcome.code == 1 and outcome.out == "the node does not fit\n"
    assert "FAIL  memory: expected memory-budget-mb of at least" in outcome.err
    assert "FAIL  connection: expected a file of root certificates" in outcome.err
    assert "ok    data:" in outcome.err


@pytest.mark.parametrize("as_json", [False, True])
def test_an_invalid_configuration_is_one_line(node, capsys, as_json):
    json_flag = ("--json",) if as_json else ()
    for wrong, word in (
        ("data-dri=x", "did you mean 'data-dir'"),
        ("density=7", "density"),
        ("x", "key=value"),
    ):
        assert_refused(run(capsys, "check-node", *node, wrong, *json_flag), word, as_json=as_json)
    assert_refused(
        run(capsys, "check-node", *node, "--recipe", "none", *json_flag), "recipe", as_json=as_json
    )
