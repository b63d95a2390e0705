from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from safetensors import safe_open
from transformers import LlamaConfig
from transformers.dynamic_module_utils import get_relative_imports

from models.checkpoints.load import load_dense, load_graph
from models.checkpoints.save import cast_weights, save_checkpoint
from models.moe.remove import keep_experts
from models.remote_code import modeling_fedgraft as modeling
from models.remote_code.configuration_fedgraft import FedGraftConfig
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from tests.conftest import shared_path, tiny_llama
from tests.support.tiny_graphs import (
    graph_of,
    logit_difference,
    random_ids,
    shared_graph_of,
    with_random_gains,
)

EXACT = ("router", "edge_gain", "edge_affinity", "output_gain")
FAMILIES = {
    "grouped-query attention, untied": {"num_key_value_heads": 2, "tie_word_embeddings": False},
    "one key and value head, tied": {"num_key_value_heads": 1, "tie_word_embeddings": True},
    "full attention, wide heads": {"num_key_value_heads": 4, "head_dim": 16},
    "attention bias": {"attention_bias": True},
    "linear rope scaling": {
        "rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0},
    },
    "Llama 3 rope scaling": {
        "rope_parameters": {
            "rope_type": "llama3",
            "rope_theta": 5e5,
            "factor": 8.0,
            "low_freq_factor": 1.0,
            "high_freq_factor": 4.0,
            "original_max_position_embeddings": 32,
        }
    },
    "another activation": {"hidden_act": "gelu"},
}


def uneven_graph(**overrides) -> FedGraftForCausalLM:
    shape = LlamaConfig(
        vocab_size=64, hidden_size=32, num_hidden_layers=2, num_attention_heads=4, max_position_embeddings=64
    ).to_dict()
    for name in ("model_type", "architectures", "transformers_version", "intermediate_size"):
        shape.pop(name, None)
    config = FedGraftConfig(
        **{
            **shape,
            "intermediate_size": 64,
            "num_experts": [4, 3],
            "expert_size": 16,
            "experts_per_token": 4,
            **overrides,
        }
    )
    torch.manual_seed(0)
    return FedGraftForCausalLM(config).eval()


@pytest.mark.parametrize("family", FAMILIES)
def test_with_every_expert_active_logits_are_the_dense_models(family):
    dense = tiny_llama(**FAMILIES[family])
    ids = random_ids(dense, 2, 100, seed=1)
    assert logit_difference(graph_of(dense), dense, ids) < 1e-4
    assert logit_difference(graph_of(dense, visits=2), dense, ids) > 1e-2


@pytest.mark.parametrize("tied", [True, False])
def test_a_bf16_checkpoint_gives_a_graph_equal_in_fp32(tmp_path, tiny_tokenizer, tied):
    tiny_llama(tie_word_embeddings=tied).to(torch.bfloat16).save_pretrained(tmp_path / "dense")
    dense = load_dense(str(tmp_path / "dense"), dtype=torch.float32)
    graph = cast_weights(graph_of(dense), torch.bfloat16)
    (tmp_path / "graph").mkdir()
    save_checkpoint(graph, tiny_tokenizer, tmp_path / "graph")
    loaded = load_graph(str(tmp_path / "graph"), dtype=torch.float32)
    assert logit_difference(loaded, dense, random_ids(dense, seed=1)) < 1e-4


@pytest.mark.parametrize("name, num_experts", [("stories260K", 4), ("mix7M", 16)])
def test_real_checkpoints_compute_what_they_computed_before(name, num_experts):
    dense = load_dense(str(shared_path(f"models/{name}")), dtype=torch.float32)
    graph = graph_of(dense, num_experts=num_experts, visits=num_experts)
    assert logit_difference(graph, dense, random_ids(dense, 2, 256, seed=1)) < 1e-4


def greedy_by_full_forward(model, ids, new_tokens: int) -> torch.Tensor:
    with torch.no_grad():
        for _ in range(new_tokens):
            best = model(input_ids=ids, use_cache=False).logits[:, -1].argmax(-1, keepdim=True)
            ids = torch.cat([ids, best], -1)
    return ids


@pytest.mark.parametrize("order", ["best-first", "depth-first"])
def test_generation_with_the_cache_is_the_full_forward(order):
    graph = with_random_gains(graph_of(visits=2))
    for layer in graph.expert_layers():
        layer.order = order
    prompt = random_ids(graph, 1, 5, seed=2)
    expected = greedy_by_full_forward(graph, prompt, 60)
    generated = graph.generate(
        prompt,
        attention_mask=torch.ones_like(prompt),
        do_sample=False,
        min_new_tokens=60,
        max_new_tokens=60,
        eos_token_id=None,
        pad_token_id=0,
    )
    assert torch.equal(generated, expected)
    assert len(set(expected[0].tolist())) > 5  # not one token for ever


@torch.no_grad()
def test_logits_with_the_cache_are_those_of_the_full_forward_at_every_step():
    graph = with_random_gains(graph_of(visits=3))
    ids = random_ids(graph, 3, 40, seed=3)
    full = graph(input_ids=ids).logits
    first = graph(input_ids=ids[:, :10], use_cache=True)
    cache, parts = first.past_key_values, [first.logits]
    for position in range(10, 40):
        step = graph(input_ids=ids[:, position : position + 1], past_key_values=cache, use_cache=True)
        cache = step.past_key_values
        parts.append(step.logits)
    torch.testing.assert_close(torch.cat(parts, 1), full, rtol=1e-4, atol=1e-4)


def test_what_decides_the_route_stays_in_fp32_in_a_bf16_checkpoint(tmp_path, tiny_tokenizer):
    graph = cast_weights(with_random_gains(graph_of(visits=2)), torch.bfloat16)
    save_checkpoint(graph, tiny_tokenizer, tmp_path)
    with safe_open(tmp_path / "model.safetensors", "pt") as file:
        stored = {name: file.get_tensor(name).dtype for name in file.keys()}  # noqa: SIM118 - not a dict
    kinds = {"edges": torch.bool, "neurons": torch.int64, **dict.fromkeys(EXACT, torch.float32)}
    for name, dtype in stored.items():
        assert dtype == kinds.get(name.rpartition(".")[2], torch.bfloat16), name
    for dtype, experts in (("auto", torch.bfloat16), (torch.bfloat16, torch.bfloat16), (torch.float32,) * 2):
        loaded = load_graph(str(tmp_path), dtype=dtype)
        for layer, original in zip(loaded.expert_layers(), graph.expert_layers(), strict=True):
            assert layer.gate_up_proj.dtype == layer.down_proj.dtype == experts
            for name in EXACT:
                value, kept = (each.routing_parameters()[name] for each in (layer, original))
                assert value.dtype == torch.float32 and torch.equal(value, kept), name
            assert layer.edges.dtype == torch.bool and torch.equal(layer.edges, original.edges)
            assert torch.equal(layer.neurons, original.neurons)


def test_a_saved_graph_loads_bit_for_bit(tmp_path, tiny_tokenizer):
    graph = with_random_gains(graph_of(visits=2))
    save_checkpoint(graph, tiny_tokenizer, tmp_path)
    loaded = load_graph(str(tmp_path))
    for name, value in graph.state_dict().items():
        assert torch.equal(loaded.state_dict()[name], value), name
    ids = random_ids(graph, seed=4)
    assert logit_difference(loaded, graph, ids) == 0
    assert loaded.config.experts_per_token == loaded.expert_layers()[0].num_visits == 2


def test_layers_may_differ_in_their_number_of_experts(tmp_path, tiny_tokenizer):
    graph = uneven_graph()
    assert [layer.num_experts for layer in graph.expert_layers()] == [4, 3]
    assert [layer.num_visits for layer in graph.expert_layers()] == [4, 3]
    ids = random_ids(graph)
    assert torch.isfinite(graph(input_ids=ids).logits).all()
    save_checkpoint(graph, tiny_tokenizer, tmp_path)
    assert logit_difference(load_graph(str(tmp_path)), graph, ids) == 0


def test_fresh_weights_start_as_a_flat_mixture_with_hard_gates():
    graph = uneven_graph(walk="depth-first", experts_per_token=2, initializer_range=0.5)
    for index, layer in enumerate(graph.expert_layers()):
        assert torch.equal(layer.edges, torch.eye(layer.num_experts, dtype=torch.bool))
        for gain in (layer.edge_gain, layer.edge_affinity, layer.output_gain):
            assert not gain.any()
        for weight in (layer.gate_up_proj, layer.down_proj, layer.router.weight):
            assert 0.3 < weight.std() < 0.7
        assert (layer.num_visits, layer.order, layer.layer_index) == (2, "depth-first", index)
        assert layer.neurons.flatten().tolist() == list(range(16 * layer.num_experts))


def test_training_reaches_every_part_of_the_model():
    graph = with_random_gains(graph_of(visits=2)).train()
    ids = random_ids(graph, 8, 100)
    graph(input_ids=ids, labels=ids).loss.backward()
    for name, parameter in graph.named_parameters():
        assert parameter.grad is not None and parameter.grad.abs().sum() > 0, name


def test_a_damaged_router_is_named_by_its_layer():
    graph = graph_of(visits=2)
    graph.expert_layers()[1].router.weight.data[0, 0] = float("nan")
    with pytest.raises(FloatingPointError, match="layer 1"):
        graph(input_ids=random_ids(graph))


FRESH = """
import sys

class Absent:
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("configs", "experts", "models", "federated", "fedgraft"):
            raise ModuleNotFoundError(f"no {name} here", name=name)

sys.meta_path.insert(0, Absent())
sys.path[:] = [entry for entry in sys.path if entry != sys.argv[3]]
try:
    import models
except ModuleNotFoundError:
    pass
else:
    raise SystemExit("the clone is still importable")
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer
model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True)
assert "transformers_modules" in type(model).__module__, type(model)
AutoTokenizer.from_pretrained(sys.argv[1])
ids = torch.load(sys.argv[2])
out = model.generate(ids[:1], max_new_tokens=4, do_sample=False, pad_token_id=0)
assert out.shape[1] > ids.shape[1]
with torch.no_grad():
    torch.save(model(input_ids=ids).logits, sys.argv[2])
"""


def pruned_shared_graph():
    return keep_experts(with_random_gains(shared_graph_of()), {1: np.arange(5)})


@pytest.mark.parametrize(
    "make", [lambda: with_random_gains(graph_of(visits=2)), pruned_shared_graph], ids=["plain", "shared"]
)
def test_the_checkpoint_loads_where_fedgraft_is_not(tmp_path, tiny_tokenizer, make):
    graph = make()
    directory, exchange = tmp_path / "graph", tmp_path / "exchange.pt"
    directory.mkdir()
    save_checkpoint(graph, tiny_tokenizer, directory)
    ids = random_ids(graph, seed=5)
    torch.save(ids, exchange)
    root = os.path.dirname(os.path.dirname(os.path.abspath(__file__)))
    environment = {
        "PATH": os.environ.get("PATH", ""),
        "HOME": str(tmp_path),
        "HF_HOME": str(tmp_path / "home"),
        "HF_MODULES_CACHE": str(tmp_path / "modules"),
        "HF_HUB_OFFLINE": "1",
        "OMP_NUM_THREADS": "1",
    }
    done = subprocess.run(
        [sys.executable, "-c", FRESH, str(directory), str(exchange), root],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert done.returncode == 0, done.stderr[-2000:]
    with torch.no_grad():
        torch.testing.assert_close(torch.load(exchange), graph(input_ids=ids).logits, rtol=1e-5, atol=1e-5)


def test_the_model_file_imports_every_other_module_itself():
    """Transformers 4.57 copies no module of a local checkpoint that only another module imports."""
    folder = Path(modeling.__file__).parent
    imported = get_relative_imports(modeling.__file__)
    assert {f"{name}.py" for name in imported} == {path.name for path in folder.glob("*_fedgraft.py")} - {
        "modeling_fedgraft.py"
    }
