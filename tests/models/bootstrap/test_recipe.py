from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors.numpy import load, save
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from models.bootstrap.build import build_graph, plan_experts
from models.bootstrap.recipe import (
    RECIPE_NAME,
    Recipe,
    base_facts,
    check_fits,
    graph_fingerprint,
    read_recipe,
    read_recipe_file,
    recipe_of,
    write_recipe,
)
from models.bootstrap.recipe_build import check_base
from models.checkpoints.load import load_dense, load_graph
from models.files.config_file import read_config
from models.files.fingerprint import fingerprint
from models.graph.graph_state import read_graph
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import BootstrapOptions, random_ids


@pytest.fixture(scope="module")
def recipe(tiny_graph_dir) -> Recipe:
    return read_recipe((tiny_graph_dir / RECIPE_NAME).read_bytes())


@pytest.fixture(scope="module")
def data(recipe) -> bytes:
    return write_recipe(recipe)


def refusal(call, *args) -> str:
    with pytest.raises(UserError) as error:
        call(*args)
    assert "\n" not in str(error.value) and len(str(error.value)) < 400
    return str(error.value)


def test_bootstrap_leaves_the_recipe_of_its_graph(tiny_graph_dir, tiny_llama_dir, recipe):
    graph, dense = load_graph(str(tiny_graph_dir)), load_dense(str(tiny_llama_dir))
    for layer, neurons, router in zip(graph.expert_layers(), recipe.neurons, recipe.routers, strict=True):
        assert np.array_equal(layer.neurons.numpy(), neurons) and neurons.dtype == np.uint16
        assert np.array_equal(layer.router.weight.detach().numpy(), router) and router.dtype == np.float32
    assert np.array_equal(np.stack(read_graph(graph).masks), recipe.masks)
    facts = recipe.facts
    assert (facts.base_fingerprint, facts.dtype) == (fingerprint(dense), "float32")
    assert (facts.experts_per_token, facts.walk) == (graph.config.experts_per_token, "best-first")
    assert facts.base_config == base_facts(dense.config)
    assert facts.base_config["rope_theta"] == 10000.0


def test_a_recipe_survives_its_bytes_which_are_the_same_each_time(tiny_graph_dir, recipe, data):
    again = read_recipe(data)
    assert again.facts == recipe.facts and write_recipe(again) == data
    assert write_recipe(recipe_of(load_graph(str(tiny_graph_dir)))) == data


def test_a_recipe_takes_two_bytes_a_neuron_and_four_a_router_weight(data):
    arrays = 2 * (2 * 64 + 4 * 4 * 32 + 4 * 4)  # layers x (neurons, router, mask)
    assert arrays < len(data) < arrays + 1000


def test_wide_layers_take_four_bytes_a_neuron():
    width = (1 << 16) + 64
    dense = tiny_llama(intermediate_size=width, hidden_size=4, num_hidden_layers=1, num_attention_heads=2)
    ids = random_ids(dense, blocks=1, length=8)
    experts = plan_experts(dense, ids, BootstrapOptions(num_experts=1))
    recipe = recipe_of(build_graph(dense, experts, 1, base_fingerprint="0" * 64))
    assert recipe.neurons.dtype == np.uint32
    assert np.array_equal(read_recipe(write_recipe(recipe)).neurons, recipe.neurons)


def test_the_file_beside_a_graph_is_found_or_not(tiny_graph_dir, tiny_llama_dir, tmp_path, data):
    assert read_recipe_file(str(tiny_graph_dir)) == data
    for source in (str(tiny_llama_dir), str(tmp_path / "none"), "nobody/nothing"):
        assert read_recipe_file(source) == b""


def altered(data: bytes, **changes) -> bytes:
    """A recipe with other arrays (None: without), or with facts changed by ``facts={...}``."""
    arrays = {name: array.copy() for name, array in load(data).items()}
    facts = json.loads(bytes(arrays["facts"])) | changes.pop("facts", {})
    text = json.dumps({key: value for key, value in facts.items() if value is not None})
    arrays["facts"] = np.frombuffer(text.encode(), dtype=np.uint8)
    return save({name: array for name, array in (arrays | changes).items() if array is not None})


def with_value(array: np.ndarray, place: tuple, value) -> np.ndarray:
    array = array.copy()
    array[place] = value
    return array


def test_every_defect_has_its_reason(recipe, data):
    neurons, routers, masks = recipe.neurons, recipe.routers, recipe.masks
    closed = masks & ~np.eye(4, dtype=bool)
    cases = [
        (b"", "safetensors"),
        (b"no recipe at all", "safetensors"),
        (data[:-1], "safetensors"),
        (altered(data, routers=None), "the tensors"),
        (altered(data, more=masks), "the tensors"),
        (altered(data, neurons=neurons.astype(np.int64)), "neurons of U16 or U32"),
        (altered(data, neurons=neurons[0]), "neurons of U16 or U32 in 3 dimensions"),
        (altered(data, neurons=with_value(neurons, (1, 0, 0), neurons[1, 0, 1])), "once in layer 1"),
        (altered(data, neurons=with_value(neurons, (0, 0, 0), 64)), "once in layer 0"),
        (altered(data, neurons=neurons[:, :, :-1]), "once in layer 0"),
        (altered(data, neurons=neurons[:1]), "as many experts"),
        (altered(data, neurons=neurons[:0], routers=routers[:0], masks=masks[:0]), "as many experts"),
        (altered(data, routers=routers[:, :3]), "as many experts"),
        (altered(data, routers=routers.astype(np.float64)), "routers of F32"),
        (altered(data, routers=with_value(routers, (1, 2, 3), np.nan)), "finite routers"),
        (altered(data, routers=with_value(routers, (0, 0, 0), -np.inf)), "finite routers"),
        (altered(data, masks=masks[:, :, :3]), "as many experts"),
        (altered(data, masks=masks.astype(np.uint8)), "masks of BOOL"),
        (altered(data, masks=(masks.astype(np.uint8) * 2).view(bool)), "masks of 0 and 1"),
        (altered(data, masks=with_value(masks, (1, 3, 0), True)), "layer 1: .*upper-triangular"),
        (altered(data, masks=closed), "layer 0: .*reach"),
        (altered(data, facts={"format": 2}), "format"),
        (altered(data, facts={"dtype": "int8"}), "dtype"),
        (altered(data, facts={"walk": "sideways"}), "walk"),
        (altered(data, facts={"walk": None}), "walk"),
        (altered(data, facts={"more": 1}), "more"),
        (altered(data, facts={"base_fingerprint": "../../etc"}), "base_fingerprint"),
        (altered(data, facts={"experts_per_token": 0}), "experts_per_token"),
        (altered(data, facts={"experts_per_token": 5}), "at most 4 experts per token"),
        (altered(data, facts={"base_config": {"rope_theta": [1]}}), "base_config"),
    ]
    for broken, reason in cases:
        with pytest.raises(UserError, match=reason) as error:
            read_recipe(broken)
        assert "\n" not in str(error.value), reason


@settings(max_examples=300, deadline=None)
@given(choices=st.data())
def test_bytes_that_flipped_are_a_recipe_or_refused(data, choices):
    broken = bytearray(data)
    for _ in range(choices.draw(st.integers(1, 4))):
        broken[choices.draw(st.integers(0, len(data) - 1))] ^= choices.draw(st.integers(1, 255))
    try:
        recipe = read_recipe(bytes(broken))
    except UserError:
        return
    assert np.isfinite(recipe.routers).all()
    assert np.array_equal(np.sort(recipe.neurons.reshape(2, -1)), np.tile(np.arange(64), (2, 1)))


def test_a_recipe_fits_its_base_and_no_other(recipe):
    check_fits(recipe, tiny_llama().config, "here")
    others = {
        "num_hidden_layers": 3,
        "intermediate_size": 128,
        "hidden_size": 64,
        "rms_norm_eps": 1e-3,
        "num_key_value_heads": 1,
        "attention_bias": True,
        "tie_word_embeddings": True,
        "hidden_act": "gelu",
    }
    for name, value in others.items():
        message = refusal(check_fits, recipe, tiny_llama(**{name: value}).config, "/some/base")
        assert name in message or "head_dim" in message
        assert "/some/base" in message
    rope = tiny_llama(rope_parameters={"rope_type": "default", "rope_theta": 5e5}).config
    assert "rope_theta = 10000.0" in refusal(check_fits, recipe, rope, "")
    unknown = recipe.facts.model_copy(update={"base_config": {"vanished": 1}})
    assert "vanished" in refusal(
        check_fits, Recipe(unknown, recipe.neurons, recipe.routers, recipe.masks), tiny_llama().config, ""
    )


def test_a_base_is_checked_without_its_weights(tiny_llama_dir, tiny_graph_dir, tmp_path):
    for name in ("config.json", RECIPE_NAME):
        (tmp_path / name).write_bytes((tiny_graph_dir / name).read_bytes())
    (tmp_path / "base").mkdir()
    config = json.loads((tiny_llama_dir / "config.json").read_text())
    (tmp_path / "base/config.json").write_text(json.dumps(config))
    base = str(tmp_path / "base")
    check_base(base, str(tmp_path))
    assert "dense model of type llama" in refusal(check_base, str(tmp_path), str(tmp_path))
    (tmp_path / "base/config.json").write_text(json.dumps(config | {"rms_norm_eps": 0.5}))
    assert "rms_norm_eps" in refusal(check_base, base, str(tmp_path))
    (tmp_path / RECIPE_NAME).unlink()
    assert "expected recipe.safetensors" in refusal(check_base, str(tiny_llama_dir), str(tmp_path))
    assert "none" in refusal(check_base, str(tmp_path / "none"), str(tiny_graph_dir))


def test_a_graph_s_fingerprint_knows_its_weights_and_how_it_is_walked(tiny_graph_dir, tmp_path):
    base = graph_fingerprint(str(tiny_graph_dir))
    assert len(base) == 64 and base == graph_fingerprint(str(tiny_graph_dir), tmp_path / "memory")
    config = json.loads((tiny_graph_dir / "config.json").read_text())
    tensors = load_file(tiny_graph_dir / "model.safetensors")

    def of(name: str, config: dict, tensors: dict[str, torch.Tensor]) -> str:
        folder = Path(tmp_path / name)
        folder.mkdir()
        (folder / "config.json").write_text(json.dumps(config))
        save_file(tensors, folder / "model.safetensors")
        return graph_fingerprint(str(folder))

    assert of("same", config, tensors) == base
    others = [
        of("visits", config | {"experts_per_token": 1}, tensors),
        of("walk", config | {"walk": "depth-first"}, tensors),
        of("version", config | {"graph_version": 1}, tensors),
        of("weights", config, tensors | {"model.norm.weight": tensors["model.norm.weight"] + 1}),
    ]
    assert len({base, *others}) == 5


def test_a_dense_model_has_no_graph_fingerprint(tiny_llama_dir):
    assert "expert graph" in refusal(graph_fingerprint, str(tiny_llama_dir))
    assert read_config(str(tiny_llama_dir)).model_type == "llama"
