from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from models.bootstrap import recipe_build as module
from models.bootstrap.build import BootstrapOptions
from models.bootstrap.pipeline import bootstrap_checkpoint
from models.bootstrap.recipe import RECIPE_NAME, Recipe, graph_fingerprint, read_recipe, read_recipe_file
from models.bootstrap.recipe_build import DenseBase, build_from_recipe
from models.checkpoints.disk_experts import open_mapped
from models.checkpoints.load import load_dense, load_graph
from models.files.fingerprint import checkpoint_fingerprint, fingerprint
from models.runtime.perplexity import evaluate_loss
from tests.conftest import shared_path, tiny_llama
from tests.support.tiny_federation import all_equal
from tests.support.tiny_graphs import logit_difference, random_ids


def bootstrapped(base: Path, out: Path, **plan) -> Path:
    bootstrap_checkpoint(
        source=str(base),
        out=out,
        options=BootstrapOptions(**{"num_experts": 4, **plan}),
        calibration_ids=None,
        calibration_tokens=256,
        evaluation_tokens=128,
    )
    return out


def recipe_in(graph: Path) -> Recipe:
    return read_recipe(read_recipe_file(str(graph)))


def save_base(folder: Path, tokenizer, *, dtype=torch.float32, **overrides) -> Path:
    tiny_llama(**overrides).to(dtype).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def files_but_weights(folder: Path) -> dict[str, bytes]:
    left_out = ("cluster_stats.txt", "model.safetensors.index.json")
    return {
        path.name: path.read_bytes()
        for path in folder.iterdir()
        if path.name not in left_out and not path.match("model*.safetensors")
    }


def assert_same_graph(graph: Path, built: Path) -> None:
    """Every tensor and every other file is equal bit for bit; what clusters were like is not in a recipe."""
    stored = load_file(graph / "model.safetensors")
    parts = [load_file(path) for path in sorted(built.glob("model-*.safetensors"))]
    rebuilt = {name: value for part in parts for name, value in part.items()}
    assert stored.keys() == rebuilt.keys()
    for name, value in stored.items():
        assert value.dtype == rebuilt[name].dtype and torch.equal(value, rebuilt[name]), name
    assert files_but_weights(graph) == files_but_weights(built)
    assert checkpoint_fingerprint(str(graph)) == checkpoint_fingerprint(str(built))
    assert graph_fingerprint(str(graph)) == graph_fingerprint(str(built))
    assert all_equal(load_graph(str(graph)), load_graph(str(built)))
    assert all_equal(open_mapped(str(graph)), open_mapped(str(built)))


@pytest.mark.parametrize(
    "overrides",
    [
        {},
        {"dtype": torch.bfloat16},
        {"dtype": torch.float16},
        {"tie_word_embeddings": True},
        {"attention_bias": True},
        {"dtype": torch.bfloat16, "tie_word_embeddings": True, "attention_bias": True},
    ],
    ids=lambda overrides: " ".join(map(str, overrides.values())) or "plain",
)
def test_the_graph_is_built_bit_for_bit(tmp_path, tiny_tokenizer, overrides):
    base = save_base(tmp_path / "base", tiny_tokenizer, **overrides)
    graph = bootstrapped(base, tmp_path / "graph")
    build_from_recipe(str(base), recipe_in(graph), tmp_path / "built")
    assert_same_graph(graph, tmp_path / "built")


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_shared_experts_and_default_outputs_are_built_bit_for_bit(tmp_path, tiny_tokenizer, dtype):
    base = save_base(tmp_path / "base", tiny_tokenizer, dtype=dtype)
    plan = {"router": "contribution", "features": "gate-activation", "num_shared": 2, "default_rank": 3}
    graph = bootstrapped(base, tmp_path / "graph", num_experts=8, **plan)
    build_from_recipe(str(base), recipe_in(graph), tmp_path / "built")
    assert_same_graph(graph, tmp_path / "built")
    one, other = (load_graph(str(path), dtype=torch.float32) for path in (graph, tmp_path / "built"))
    assert other.config.num_shared == [2, 2] and other.config.default_rank == 3
    ids = random_ids(one)
    assert evaluate_loss(one, ids, ids).mean == evaluate_loss(other, ids, ids).mean
    for layer in other.expert_layers():
        layer.default.up.data.zero_()
    assert logit_difference(one, other, ids) > 1e-3


@pytest.mark.parametrize("experts", [1, 64])
def test_one_expert_and_an_expert_per_neuron(tmp_path, tiny_llama_dir, experts):
    graph = bootstrapped(tiny_llama_dir, tmp_path / "graph", num_experts=experts, experts_per_token=experts)
    build_from_recipe(str(tiny_llama_dir), recipe_in(graph), tmp_path / "built")
    assert_same_graph(graph, tmp_path / "built")


def test_a_base_in_several_files_or_without_generation_settings_serves_too(
    tmp_path, tiny_tokenizer, tiny_llama_dir, tiny_graph_dir
):
    sharded = save_base(tmp_path / "sharded", tiny_tokenizer)
    (sharded / "model.safetensors").unlink()
    tiny_llama().save_pretrained(sharded, max_shard_size="30kB")
    build_from_recipe(str(sharded), recipe_in(tiny_graph_dir), tmp_path / "built")
    assert_same_graph(tiny_graph_dir, tmp_path / "built")
    bare = Path(shutil.copytree(tiny_llama_dir, tmp_path / "bare"))
    (bare / "generation_config.json").unlink()
    graph = bootstrapped(bare, tmp_path / "bare-graph")
    build_from_recipe(str(bare), recipe_in(graph), tmp_path / "bare-built")
    assert_same_graph(graph, tmp_path / "bare-built")


def test_what_a_base_stores_beside_its_parameters_does_not_count(tmp_path, tiny_tokenizer):
    """Some checkpoints hold the tied head a second time, or the frequencies of the rotary embedding."""
    base = save_base(tmp_path / "base", tiny_tokenizer, tie_word_embeddings=True)
    graph = bootstrapped(base, tmp_path / "graph")
    tensors = load_file(base / "model.safetensors")
    head = tensors["model.embed_tokens.weight"].clone()
    more = {"lm_head.weight": head, "model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(4)}
    save_file(tensors | more, base / "model.safetensors", {"format": "pt"})
    build_from_recipe(str(base), recipe_in(graph), tmp_path / "built")
    assert_same_graph(graph, tmp_path / "built")


def test_the_fingerprint_of_a_base_on_disk_is_that_of_the_loaded_model(tmp_path, tiny_tokenizer):
    for index, overrides in enumerate(({}, {"dtype": torch.bfloat16, "tie_word_embeddings": True})):
        base = save_base(tmp_path / str(index), tiny_tokenizer, **overrides)
        loaded = load_dense(str(base))
        assert DenseBase(str(base), loaded.dtype).fingerprint() == fingerprint(loaded)


def refusal(base: Path, recipe: Recipe, out: Path) -> str:
    with pytest.raises(UserError) as error:
        build_from_recipe(str(base), recipe, out)
    assert "\n" not in str(error.value) and not out.exists()
    assert not list(out.parent.glob("*.partial")) + list(out.parent.glob(".*.partial"))
    return str(error.value)


def test_another_base_is_refused_in_one_line(tmp_path, tiny_tokenizer, tiny_llama_dir, tiny_graph_dir):
    recipe, out = recipe_in(tiny_graph_dir), tmp_path / "out"
    other = Path(shutil.copytree(tiny_llama_dir, tmp_path / "other"))
    tensors = load_file(other / "model.safetensors")
    tensors["model.layers.1.mlp.up_proj.weight"][0, 0] += 1e-3
    save_file(tensors, other / "model.safetensors", {"format": "pt"})
    message = refusal(other, recipe, out)
    assert recipe.facts.base_fingerprint[:12] in message and str(other) in message
    wide = save_base(tmp_path / "wide", tiny_tokenizer, intermediate_size=128)
    assert "intermediate_size = 64" in refusal(wide, recipe, out)
    assert "none" in refusal(tmp_path / "none", recipe, out)
    assert "dense model of type llama" in refusal(tiny_graph_dir, recipe, out)


def test_a_damaged_base_is_refused(tmp_path, tiny_llama_dir, tiny_graph_dir):
    recipe, out = recipe_in(tiny_graph_dir), tmp_path / "out"
    base = Path(shutil.copytree(tiny_llama_dir, tmp_path / "base"))
    tensors = load_file(base / "model.safetensors")
    for name, value in (("model.norm.weight", None), ("lm_head.weight", torch.zeros(3))):
        kept = {key: each for key, each in tensors.items() if key != name}
        changed = kept | ({name: value} if value is not None else {})
        save_file(changed, base / "model.safetensors", {"format": "pt"})
        assert name in refusal(base, recipe, out)
    (base / "model.safetensors").write_bytes(b"cut")
    assert "whole safetensors" in refusal(base, recipe, out)
    (base / "model.safetensors").unlink()
    assert "safetensors weights" in refusal(base, recipe, out)


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize("stage", ["save_checkpoint", "_expert_weights", "write_json"])
def test_a_failure_at_any_stage_leaves_nothing(
    tmp_path, tiny_llama_dir, tiny_graph_dir, monkeypatch, stage, error
):
    def failing(*args, **options):
        raise error

    monkeypatch.setattr(module, stage, failing)
    with pytest.raises(error):
        build_from_recipe(str(tiny_llama_dir), recipe_in(tiny_graph_dir), tmp_path / "out")
    assert list(tmp_path.iterdir()) == []


def test_a_folder_is_replaced_only_on_request(tmp_path, tiny_llama_dir, tiny_graph_dir):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "old").touch()
    recipe = recipe_in(tiny_graph_dir)
    with pytest.raises(UserError, match="`overwrite`"):
        build_from_recipe(str(tiny_llama_dir), recipe, tmp_path / "out")
    build_from_recipe(str(tiny_llama_dir), recipe, tmp_path / "out", overwrite=True)
    assert_same_graph(tiny_graph_dir, tmp_path / "out")


def test_each_file_holds_a_layer_at_most_and_the_index_names_all(
    tmp_path, tiny_llama_dir, tiny_graph_dir, monkeypatch
):
    written = []
    monkeypatch.setattr(
        module, "save_file", lambda tensors, *rest: (written.append(list(tensors)), save_file(tensors, *rest))
    )
    build_from_recipe(str(tiny_llama_dir), recipe_in(tiny_graph_dir), tmp_path / "out")
    layers = [{name.split(".")[2] for name in names if ".layers." in name} for names in written]
    assert layers == [set(), {"0"}, {"1"}]
    index = json.loads((tmp_path / "out/model.safetensors.index.json").read_text())
    assert sorted(index["weight_map"]) == sorted(name for names in written for name in names)
    size = sum(value.nbytes for value in load_file(tiny_graph_dir / "model.safetensors").values())
    assert index["metadata"]["total_size"] == size


def test_the_recipe_of_a_real_model_is_a_hundredth_of_its_graph(tmp_path):
    base = shared_path("models/mix7M")
    graph = bootstrapped(base, tmp_path / "graph", num_experts=16)
    build_from_recipe(str(base), recipe_in(graph), tmp_path / "built")
    assert checkpoint_fingerprint(str(graph)) == checkpoint_fingerprint(str(tmp_path / "built"))
    size = (graph / RECIPE_NAME).stat().st_size
    assert size < (graph / "model.safetensors").stat().st_size / 100
