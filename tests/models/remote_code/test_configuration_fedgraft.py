from __future__ import annotations

from typing import get_args

import pytest

from configs.schema import RunConfig
from models.bootstrap.recipe import RecipeFacts
from models.remote_code.configuration_fedgraft import WALKS, FedGraftConfig

SHAPE = {"num_hidden_layers": 2, "intermediate_size": 64, "hidden_size": 32, "num_attention_heads": 4}


def test_without_experts_named_every_layer_is_one_dense_expert():
    config = FedGraftConfig(**SHAPE)
    assert (config.num_experts, config.expert_size, config.experts_per_token) == ([1, 1], 64, 1)


def test_the_expert_size_follows_from_the_count():
    assert FedGraftConfig(**SHAPE, num_experts=[4, 4]).expert_size == 16
    assert FedGraftConfig(**SHAPE, num_experts=[4, 3], expert_size=16).expert_size == 16


def test_the_configuration_survives_the_disk(tmp_path):
    config = FedGraftConfig(
        **SHAPE,
        num_experts=[4, 3],
        expert_size=16,
        experts_per_token=3,
        walk="depth-first",
        num_shared=[1, 2],
        default_rank=2,
        default_experts=[4, 4],
        graph_version=5,
        base_fingerprint="ab",
    )
    config.save_pretrained(tmp_path)
    loaded = FedGraftConfig.from_pretrained(tmp_path)
    for name in FedGraftConfig.__annotations__:
        assert getattr(loaded, name) == getattr(config, name), name
    assert loaded.model_type == "fedgraft"


@pytest.mark.parametrize(
    "wrong, message",
    [
        ({"num_experts": [4]}, "each of the 2 layers"),
        (
            {"num_experts": [4, 3], "attached_experts": [[4], []]},
            "attached_experts must name experts of .4, 3.",
        ),
        ({"num_experts": [4, 3], "attached_experts": [[2, 1], []]}, "ascending, got"),
        ({"num_experts": [4, 3], "attached_experts": [[]]}, "for each layer"),
        ({"num_experts": 4}, "list of integers.* got 4 and 1"),
        ({"num_experts": [4, "4"]}, "list of integers"),
        ({"num_experts": [4, 0]}, "each of the 2 layers"),
        ({"num_experts": [4, 4], "experts_per_token": 5}, "between 1 and 4, got 5"),
        ({"num_experts": [4, 4], "experts_per_token": 0}, "between 1 and 4, got 0"),
        ({"num_experts": [4, 4], "num_shared": [1]}, "num_shared must name .* got .1."),
        ({"num_experts": [4, 4], "num_shared": [1, 5]}, "at most its experts"),
        ({"num_experts": [4, 3], "default_experts": [4]}, "for each layer, got .4."),
        (
            {"num_experts": [4, 3], "default_experts": [4, 2]},
            "at least the experts that are not attached, .4, 3., .* got .4, 2.",
        ),
        ({"num_experts": [4, 4], "walk": "sideways"}, "best-first.*sideways"),
    ],
)
def test_shapes_that_cannot_be_held_are_refused(wrong, message):
    with pytest.raises(Exception, match=message):
        FedGraftConfig(**SHAPE, **wrong)


def test_runs_and_recipes_accept_the_walks_of_the_model():
    assert get_args(RunConfig.model_fields["walk"].annotation) == ("", *WALKS)
    assert get_args(RecipeFacts.model_fields["walk"].annotation) == WALKS
