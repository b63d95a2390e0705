from __future__ import annotations

import pytest
import torch
from transformers import LlamaConfig

from configs.errors import UserError
from configs.schema import load_run_config
from federated.run_setup import override_routing, prepare_process, with_block_size
from tests.support.tiny_graphs import graph_of


def test_threads_and_seed_follow_the_configuration():
    prepare_process(load_run_config({"num-threads": 2, "seed": 5}))
    assert torch.get_num_threads() == 2
    drawn = torch.rand(1)
    prepare_process(load_run_config({"seed": 5}))
    assert torch.get_num_threads() == 1 and torch.equal(torch.rand(1), drawn)


def test_block_size_fits_the_models_context():
    config = LlamaConfig(max_position_embeddings=100)
    assert with_block_size(load_run_config({}), config).block_size == 100
    assert with_block_size(load_run_config({"block-size": 64}), config) == load_run_config({"block-size": 64})
    with pytest.raises(UserError, match="block-size to be at most .* 100, got 128"):
        with_block_size(load_run_config({"block-size": 128}), config)


def test_routing_stays_the_graphs_own_unless_the_run_names_another():
    model = graph_of(visits=2)
    walk = model.config.walk
    override_routing(model, load_run_config({}))
    assert (model.config.walk, [layer.num_visits for layer in model.expert_layers()]) == (walk, [2, 2])
    override_routing(model, load_run_config({"experts-per-token": 3, "walk": "depth-first"}))
    assert (model.config.walk, model.config.experts_per_token) == ("depth-first", 3)
    assert [(layer.order, layer.num_visits) for layer in model.expert_layers()] == [("depth-first", 3)] * 2
    with pytest.raises(UserError, match="experts per token between 1 and 4, got 5"):
        override_routing(model, load_run_config({"experts-per-token": 5}))
