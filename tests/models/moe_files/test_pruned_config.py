from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest

from configs.errors import UserError
from experts.graph.expert_graph import ExpertGraph
from models.checkpoints.save import save_checkpoint
from models.moe_files.layout import MoELayout, read_moe_layout
from models.moe_files.pruned_config import pruned_config
from tests.support.tiny_graphs import graph_of
from tests.support.tiny_moes import saved_moe

TWO = {0: np.array([0, 3]), 1: np.array([1, 2])}


@pytest.fixture
def olmoe(tmp_path, tiny_tokenizer) -> MoELayout:
    return read_moe_layout(saved_moe("olmoe", tmp_path, tiny_tokenizer))


def with_config(layout: MoELayout, **values) -> MoELayout:
    return replace(layout, config=layout.config | values)


def test_only_the_number_of_experts_changes(olmoe):
    config, warnings = pruned_config(olmoe, TWO)
    assert config == olmoe.config | {"num_experts": 2} and warnings == ()
    assert olmoe.config["num_experts"] == 5


def test_every_key_that_holds_the_number_changes_and_one_is_added_where_none_does(olmoe):
    both = with_config(olmoe, num_local_experts=5)
    config, _ = pruned_config(both, TWO)
    assert (config["num_experts"], config["num_local_experts"]) == (2, 2)
    config, _ = pruned_config(with_config(olmoe, num_experts=None), TWO)
    assert config["num_experts"] == 2


def test_k_is_clamped_to_what_is_left_with_a_warning(olmoe):
    config, warnings = pruned_config(with_config(olmoe, num_experts_per_tok=4), TWO)
    assert config["num_experts_per_tok"] == 2 and len(warnings) == 1 and "from 4 to 2" in warnings[0]


def test_our_graph_holds_a_number_per_layer_from_all_layers(tmp_path, tiny_tokenizer):
    save_checkpoint(graph_of(visits=4), tiny_tokenizer, tmp_path)
    layout = read_moe_layout(tmp_path)
    config, warnings = pruned_config(
        layout,
        {0: np.array([1]), 1: np.array([0, 2, 3])},
        ExpertGraph((np.eye(1, dtype=bool), np.eye(3, dtype=bool)), 9),
    )
    assert (
        config["num_experts"] == [1, 3] and config["experts_per_token"] == 3 and config["graph_version"] == 9
    )
    assert "from 4 to 3" in warnings[0]


def test_the_groups_of_a_router_are_filled_evenly(tmp_path, tiny_tokenizer):
    layout = read_moe_layout(saved_moe("glm4_moe", tmp_path, tiny_tokenizer, n_routed_experts=8, n_group=2))
    even = {0: np.array([0, 3, 4, 7]), 1: np.array([1, 2, 5, 6])}
    assert pruned_config(layout, even)[1] == ()
    (warning,) = pruned_config(layout, even | {1: np.array([0, 1, 2, 5])})[1]
    assert "in layers 1 have other members" in warning
    for count in (2, 3, 5):
        with pytest.raises(UserError, match=f"2 groups, equally many in each, got {count}"):
            pruned_config(layout, {0: np.arange(count), 1: np.arange(count)})
    config, _ = pruned_config(with_config(layout, num_experts_per_tok=4), even)
    assert config["num_experts_per_tok"] == 2  # one group of two is chosen
