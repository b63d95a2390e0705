from __future__ import annotations

import pytest

from configs.errors import UserError
from configs.keys import keys_of
from configs.node_config import NodeConfig, load_node_config


def test_flowers_own_keys_are_enough_and_leave_everything_to_the_run():
    node = load_node_config({"partition-id": 3, "num-partitions": 8})
    assert (node.partition_id, node.num_partitions) == (3, 8)
    assert (node.graph, node.base, node.data_dir, node.cache_dir, node.cache_days) == ("", "", "", "", 30)
    assert (node.expert_budget, node.memory_budget_mb, node.density, node.upload_budget_mb) == (
        None,
        0,
        None,
        None,
    )


def test_every_key_is_taken_in_flowers_types():
    values = {
        "partition-id": 0,
        "num-partitions": 2,
        "graph": "/g",
        "base": "owner/llama",
        "data-dir": 2024,
        "cache-dir": "/c",
        "cache-days": 7,
        "cache-mb": 100,
        "device": "cpu",
        "memory-budget-mb": 900,
        "density": 1,
        "upload-budget-mb": 2,
    }
    node = load_node_config(values)
    assert set(values) | {"expert-budget"} == set(keys_of(NodeConfig))
    assert (node.data_dir, node.density, node.upload_budget_mb) == ("2024", 1.0, 2.0)
    assert load_node_config({"partition-id": 0, "expert-budget": 4}).expert_budget == 4


def test_every_key_has_one_line_of_documentation():
    for name, field in NodeConfig.model_fields.items():
        assert field.description and "\n" not in field.description and field.description.endswith("."), name


@pytest.mark.parametrize(
    ("values", "message"),
    [
        (
            {"expert-buget": 4},
            "unknown node-config key 'expert-buget' (did you mean 'expert-budget'?); client 0 may set partition-id,",
        ),
        ({"cache_dir": "/c"}, "(did you mean 'cache-dir'?)"),
        ({"lora-rank": 4}, "unknown node-config key 'lora-rank'; client 0 may set"),
        (
            {"partition-id": "0"},
            "expected partition-id to be a valid integer, got '0' in the node-config of client 0",
        ),
        ({"partition-id": -1}, "expected partition-id to be a value greater than or equal to 0, got -1"),
        (
            {"density": 0},
            "expected density to be a value greater than 0, got 0 in the node-config of client 0",
        ),
        ({"density": "x"}, "expected density to be a valid number, got 'x'"),
        (
            {"upload-budget-mb": -1},
            "expected upload-budget-mb to be a value greater than or equal to 0, got -1",
        ),
        ({"memory-budget-mb": 1.5}, "expected memory-budget-mb to be a valid integer, got 1.5"),
        ({"expert-budget": True}, "expected expert-budget to be a valid integer, got True"),
        ({"graph": False}, "expected graph to be a valid string, got False"),
        (
            {"expert-budget": 2, "memory-budget-mb": 900},
            "expected expert-budget or memory-budget-mb, got both; drop one of them in the node-config of client 0",
        ),
    ],
)
def test_bad_values_are_refused_in_one_line_that_names_the_client(values, message):
    with pytest.raises(UserError) as caught:
        load_node_config({"partition-id": 0, **values})
    assert message in str(caught.value) and "\n" not in str(caught.value)


def test_a_node_without_a_partition_is_told_to_set_it():
    with pytest.raises(UserError) as caught:
        load_node_config({"num-partitions": 2})
    expected = "expected a value for partition-id, got none; set partition-id in the node-config of a client"
    assert str(caught.value) == expected
