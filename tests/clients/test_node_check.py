from __future__ import annotations

from pathlib import Path

import pytest

from clients.node_check import NodeCheck, read_recipe_of
from configs.errors import UserError
from configs.schema import RunConfig
from models.bootstrap.recipe import RECIPE_NAME, graph_fingerprint
from tests.support.tiny_federation import node_of, tiny_config, write_texts


@pytest.fixture
def config(tmp_path, tiny_graph_dir) -> RunConfig:
    """Run configuration of nodes that have their own graph and data."""
    return tiny_config(Path(""), tmp_path / "run", local_steps=2, num_clients=3, log_dir="")


def check(config: RunConfig, tmp_path: Path, *, fingerprint: str = "", recipe: bytes = b"", **node: object):
    write_texts(tmp_path / "private", ["letters"])
    values: dict[str, object] = {"data-dir": str(tmp_path / "private"), "cache-dir": str(tmp_path / "cache")}
    values |= {key.replace("_", "-"): value for key, value in node.items()}
    checked = NodeCheck(config, node_of(values), fingerprint, recipe)
    assert list(checked.run()) == checked.findings
    return checked


def failures(checked: NodeCheck) -> dict[str, str]:
    return {finding.name: finding.detail for finding in checked.findings if not finding.ok}


def test_a_node_that_fits_knows_the_cost_of_a_round(config, tmp_path, tiny_graph_dir):
    checked = check(config, tmp_path, graph=str(tiny_graph_dir))
    assert failures(checked) == {}
    assert [finding.name for finding in checked.findings] == ["graph", "data", "disk", "memory", "round"]
    assert checked.fingerprint == graph_fingerprint(str(tiny_graph_dir))
    assert checked.cost.seconds > 0 and checked.cost.bytes_down == 3 * checked.cost.bytes_up > 3000
    assert checked.cost.memory_mb > 50
    assert not list((tmp_path / "cache").glob("run-*"))


def test_the_graph_is_built_from_its_base_with_recipe_and_fingerprint(
    config, tmp_path, tiny_graph_dir, tiny_llama_dir
):
    base = {"base": str(tiny_llama_dir)}
    assert "ask the operator" in failures(check(config, tmp_path, **base))["graph"]
    recipe = read_recipe_of(tiny_graph_dir)
    assert recipe == read_recipe_of(tiny_graph_dir / RECIPE_NAME)
    fingerprint = graph_fingerprint(str(tiny_graph_dir))
    checked = check(config, tmp_path, fingerprint=fingerprint, recipe=recipe, **base)
    assert failures(checked) == {} and checked.cost is not None
    assert (tmp_path / "cache" / "graphs" / fingerprint / "config.json").is_file()
    with pytest.raises(UserError, match="found none at"):
        read_recipe_of(tmp_path)


def test_another_graph_than_the_server_s_ends_the_check(config, tmp_path, tiny_graph_dir):
    checked = check(config, tmp_path, graph=str(tiny_graph_dir), fingerprint="0" * 64)
    assert list(failures(checked)) == ["graph"] and len(checked.findings) == 1
    assert "expected the same bootstrapped checkpoint" in failures(checked)["graph"]


@pytest.mark.parametrize(
    ("node", "name", "message"),
    [
        ({"data_dir": "/no/such/data"}, "data", "/no/such/data"),
        ({"memory_budget_mb": 1}, "memory", "expected memory-budget-mb of at least"),
        ({"device": "cuda"}, "memory", "expected a CUDA device"),
        ({"expert_budget": 9}, "memory", "expected a budget from 1"),
        ({"cache_dir": "/proc/none"}, "disk", "/proc/none"),
    ],
)
def test_what_does_not_fit_is_named_and_no_round_is_tried(
    config, tmp_path, tiny_graph_dir, node, name, message
):
    checked = check(config, tmp_path, graph=str(tiny_graph_dir), **node)
    assert not checked.ok and checked.cost is None
    assert message in failures(checked)[name]
    assert "round" not in [finding.name for finding in checked.findings]


def test_too_little_memory_and_disk_are_named(config, tmp_path, tiny_graph_dir, monkeypatch, little_room):
    monkeypatch.setattr("clients.node_check.activation_bytes", lambda *_: 2.0**60)
    checked = check(config, tmp_path, graph=str(tiny_graph_dir))
    assert "lower batch-size" in failures(checked)["memory"]
    assert "free on the file system" in failures(checked)["disk"]
