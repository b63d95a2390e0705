from __future__ import annotations

import json

import pytest
import torch
from transformers import GPT2Config

from configs.errors import UserError
from models.files.config_file import check_is_dense, check_is_graph, read_config, read_dtype
from models.remote_code.configuration_fedgraft import FedGraftConfig
from tests.conftest import tiny_llama


def test_a_configuration_is_read_with_the_classes_known_here(tiny_llama_dir, tiny_graph_dir):
    assert read_config(str(tiny_llama_dir)).model_type == "llama"
    graph = read_config(str(tiny_graph_dir))
    assert type(graph) is FedGraftConfig and graph.num_experts == [4, 4]


@pytest.mark.parametrize("text", ["{", "[]", "", '{"model_type": "no-such-model"}', "{}"])
def test_a_configuration_that_cannot_be_read(tmp_path, text):
    (tmp_path / "config.json").write_text(text)
    with pytest.raises(
        UserError, match="expected a checkpoint directory with config.json or a hub id"
    ) as error:
        read_config(str(tmp_path))
    assert "\n" not in str(error.value)


def test_graphs_and_dense_models_are_told_apart(tiny_llama_dir, tiny_graph_dir):
    dense, graph = read_config(str(tiny_llama_dir)), read_config(str(tiny_graph_dir))
    check_is_dense(dense, "here")
    check_is_graph(graph, "here")
    with pytest.raises(UserError, match="expected a dense model of type llama, got 'fedgraft' in here"):
        check_is_dense(graph, "here")
    with pytest.raises(
        UserError, match="got a model of type 'llama' in here; make one with `fedgraft bootstrap"
    ):
        check_is_graph(dense, "here")
    with pytest.raises(UserError, match="'gpt2'"):
        check_is_dense(GPT2Config(), "here")
    with pytest.raises(UserError, match="mlp_bias"):
        check_is_dense(tiny_llama(mlp_bias=True).config, "here")


@pytest.mark.parametrize("stored, dtype", [("bfloat16", torch.bfloat16), (None, torch.float32)])
def test_the_dtype_of_the_weights(tmp_path, tiny_llama_dir, stored, dtype):
    values = json.loads((tiny_llama_dir / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps({**values, "dtype": stored}))
    assert read_dtype(str(tmp_path)) == dtype
