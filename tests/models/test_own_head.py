"""A head of its own in the weights of a model that is tied by its configuration: every step keeps its function."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from models.bootstrap import pipeline
from models.bootstrap.build import BootstrapOptions
from models.bootstrap.pipeline import bootstrap_checkpoint
from models.bootstrap.recipe import read_recipe, read_recipe_file
from models.bootstrap.recipe_build import DenseBase, build_from_recipe, check_base
from models.checkpoints.convert import as_checkpoint
from models.checkpoints.disk_experts import open_mapped
from models.checkpoints.load import load_causal_lm, load_dense, load_graph
from models.files.config_file import read_config
from models.files.fingerprint import fingerprint
from models.moe_files.prune import prune_checkpoint
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from tests.conftest import tiny_llama
from tests.models.export.dense_export import export_dense
from tests.support.own_head import add_head, own_head, own_head_logits, save_with_own_head
from tests.support.tiny_graphs import graph_of, random_ids
from tests.support.tiny_moes import saved_moe

IDS = random_ids(tiny_llama(), 2, 16)


@pytest.fixture
def base(tmp_path, tiny_tokenizer) -> Path:
    return save_with_own_head(tmp_path / "base", tiny_tokenizer)


@pytest.fixture
def graph(base, tmp_path) -> Path:
    bootstrap_checkpoint(
        source=str(base),
        out=tmp_path / "graph",
        options=BootstrapOptions(4, experts_per_token=4),
        calibration_ids=random_ids(tiny_llama(), 12, 32),
        calibration_tokens=256,
        evaluation_tokens=128,
    )
    return tmp_path / "graph"


@torch.no_grad()
def assert_own_head(model) -> None:
    torch.testing.assert_close(model(input_ids=IDS).logits, own_head_logits(IDS), rtol=0, atol=1e-4)
    assert model.config.tie_word_embeddings is False


def test_every_loader_keeps_it(base):
    assert_own_head(load_dense(str(base)))
    assert_own_head(load_causal_lm(str(base)))


def test_graphs_and_exports_keep_it_and_say_that_they_are_not_tied(base, graph, tmp_path):
    assert read_config(str(graph)).tie_word_embeddings is False
    for load in (load_graph, open_mapped, FedGraftForCausalLM.from_pretrained):
        assert_own_head(load(str(graph)))
    export = export_dense(load_graph(str(graph)))
    assert export.max_logit_difference < 1e-4
    export.model.save_pretrained(tmp_path / "dense")
    assert_own_head(load_dense(str(tmp_path / "dense")))


def test_a_graph_that_says_tied_opens_from_the_disk_as_it_does_in_memory(tmp_path):
    graph_of(tiny_llama(tie_word_embeddings=True)).save_pretrained(tmp_path)
    add_head(tmp_path)
    assert_own_head(open_mapped(str(tmp_path)))
    assert_own_head(load_graph(str(tmp_path)))


def test_the_graph_is_built_from_the_recipe_with_it(base, graph, tmp_path):
    recipe = read_recipe(read_recipe_file(str(graph)))
    assert DenseBase(str(base), torch.float32).fingerprint() == fingerprint(load_dense(str(base)))
    check_base(str(base), str(graph))
    build_from_recipe(str(base), recipe, tmp_path / "built")
    assert_own_head(load_graph(str(tmp_path / "built")))
    assert (tmp_path / "built/config.json").read_bytes() == (graph / "config.json").read_bytes()


def test_a_checkpoint_of_bin_files_is_converted_with_it(base):
    torch.save(load_file(base / "model.safetensors"), base / "pytorch_model.bin")
    (base / "model.safetensors").unlink()
    converted = as_checkpoint(str(base))
    assert read_config(converted).tie_word_embeddings is False
    assert_own_head(load_dense(converted))


def test_a_pruned_checkpoint_says_that_it_is_not_tied(tmp_path, tiny_tokenizer):
    source = saved_moe("olmoe", tmp_path, tiny_tokenizer, tie_word_embeddings=True)
    add_head(source)
    prune_checkpoint(source, tmp_path / "pruned", {})
    assert read_config(str(tmp_path / "pruned")).tie_word_embeddings is False
    model = load_causal_lm(str(tmp_path / "pruned"))
    assert torch.equal(model.lm_head.weight, own_head())


def test_a_bootstrap_to_another_function_writes_nothing(base, tmp_path, monkeypatch):
    def tied(model, *args, **options):
        graph = pipeline_build(model, *args, **options)
        graph.lm_head.weight = graph.model.embed_tokens.weight
        return graph

    pipeline_build = pipeline.build_graph
    monkeypatch.setattr(pipeline, "build_graph", tied)
    with pytest.raises(Exception, match="all experts active"):
        bootstrap_checkpoint(
            source=str(base),
            out=tmp_path / "graph",
            options=BootstrapOptions(4),
            calibration_ids=random_ids(tiny_llama(), 12, 32),
            calibration_tokens=256,
            evaluation_tokens=128,
        )
    assert [path.name for path in tmp_path.iterdir()] == ["base"]
