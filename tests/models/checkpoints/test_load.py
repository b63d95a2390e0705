from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import GPT2Config, GPT2LMHeadModel

from configs.errors import UserError
from models.checkpoints.load import check_weights, load_causal_lm, load_dense, load_graph, load_tokenizer
from models.checkpoints.save import cast_weights, save_checkpoint
from models.files.config_file import read_config
from models.files.fingerprint import fingerprint
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.runtime.nf4 import weight_of
from models.runtime.nf4_linear import NF4Linear
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import logit_difference, random_ids


@pytest.fixture
def damaged(tmp_path, tiny_llama_dir) -> Path:
    """A copy of the tiny Llama that a test may spoil."""
    return Path(shutil.copytree(tiny_llama_dir, tmp_path / "damaged"))


@pytest.fixture(scope="module")
def gpt2_dir(tmp_path_factory) -> Path:
    directory = tmp_path_factory.mktemp("gpt2")
    GPT2LMHeadModel(
        GPT2Config(vocab_size=64, n_embd=16, n_layer=1, n_head=2, n_positions=32)
    ).save_pretrained(directory)
    return directory


def refusal(load, source: Path | str) -> str:
    with pytest.raises(UserError) as error:
        load(str(source))
    assert "\n" not in str(error.value)
    return str(error.value)


def edit_config(directory: Path, **changes) -> None:
    path = directory / "config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **changes}))


def test_what_was_saved_is_loaded(tiny_llama_dir, tiny_graph_dir):
    dense = load_dense(str(tiny_llama_dir))
    assert fingerprint(dense) == fingerprint(tiny_llama()) and not dense.training
    graph = load_graph(str(tiny_graph_dir))
    assert isinstance(graph, FedGraftForCausalLM) and not graph.training
    assert graph.config.base_fingerprint == fingerprint(dense)
    assert type(load_causal_lm(str(tiny_llama_dir))) is type(dense)
    assert type(load_causal_lm(str(tiny_graph_dir))) is FedGraftForCausalLM
    assert load_dense(str(tiny_llama_dir), dtype=torch.bfloat16).dtype == torch.bfloat16


def test_a_dtype_of_the_checkpoint_is_kept(tmp_path):
    tiny_llama().to(torch.bfloat16).save_pretrained(tmp_path)
    assert load_dense(str(tmp_path)).dtype == torch.bfloat16


@pytest.mark.parametrize("load", [load_dense, load_graph, load_causal_lm, read_config])
def test_a_source_that_is_not_there(tmp_path, load):
    assert "absent" in refusal(load, tmp_path / "absent")
    (tmp_path / "empty").mkdir()
    assert "config.json" in refusal(load, tmp_path / "empty")
    assert "nobody/nothing" in refusal(load, "nobody/nothing")
    refusal(load, "")


@pytest.mark.parametrize("text", ["{", "[]", "3", "", '{"model_type": "no-such-model"}', "{}", "\x00\xff"])
def test_a_configuration_that_cannot_be_read(damaged, text):
    (damaged / "config.json").write_text(text)
    for load in (load_dense, load_graph, load_causal_lm):
        refusal(load, damaged)


def test_another_architecture_is_named_beside_those_supported(gpt2_dir, tiny_graph_dir):
    message = refusal(load_dense, gpt2_dir)
    assert "'gpt2'" in message and "llama" in message
    assert "'fedgraft'" in refusal(load_dense, tiny_graph_dir)
    assert load_causal_lm(str(gpt2_dir)).config.model_type == "gpt2"


def test_a_dense_model_is_no_graph_and_the_way_to_one_is_told(tiny_llama_dir):
    message = refusal(load_graph, tiny_llama_dir)
    assert "'llama'" in message and "fedgraft bootstrap" in message


def test_a_biased_ffn_is_refused(tmp_path):
    tiny_llama(mlp_bias=True).save_pretrained(tmp_path)
    assert "mlp_bias" in refusal(load_dense, tmp_path)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_truncated_weights_are_refused(damaged, kept):
    weights = damaged / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    for load in (load_dense, load_causal_lm):
        assert "safetensors" in refusal(load, damaged)


@pytest.mark.parametrize("kept", [0, 4, 100, 0.5, 0.999])
def test_weights_cut_short_are_found_without_reading_them(damaged, kept):
    check_weights(str(damaged))
    weights = damaged / "model.safetensors"
    data = weights.read_bytes()
    weights.write_bytes(data[: int(kept * len(data)) if isinstance(kept, float) else kept])
    assert "whole safetensors" in refusal(check_weights, damaged)
    weights.unlink()
    assert "got none" in refusal(check_weights, damaged)


def test_the_weights_of_a_hub_id_are_not_looked_for():
    check_weights("owner/model")


def test_a_truncated_graph_is_refused(tmp_path, tiny_graph_dir):
    copy = Path(shutil.copytree(tiny_graph_dir, tmp_path / "graph"))
    weights = copy / "model.safetensors"
    weights.write_bytes(weights.read_bytes()[:-10])
    assert "safetensors" in refusal(load_graph, copy)


def test_weights_that_are_not_there_are_refused(damaged):
    (damaged / "model.safetensors").unlink()
    assert "safetensors" in refusal(load_dense, damaged)


def test_a_missing_tensor_is_named(damaged):
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(load_dense, damaged)


def test_a_tensor_of_another_shape_is_named(damaged):
    tensors = load_file(damaged / "model.safetensors")
    tensors["model.norm.weight"] = torch.ones(31)
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    assert "norm.weight" in refusal(load_dense, damaged)


def test_a_configuration_that_does_not_fit_the_weights(damaged):
    edit_config(damaged, num_hidden_layers=3)
    assert "layers.2" in refusal(load_dense, damaged)
    edit_config(damaged, num_hidden_layers=2, intermediate_size=96)
    assert "mlp" in refusal(load_dense, damaged)


@pytest.mark.parametrize("changes", [{"walk": "sideways"}, {"experts_per_token": 9}, {"num_experts": [4]}])
def test_a_graph_whose_configuration_makes_no_sense(tmp_path, tiny_graph_dir, changes):
    copy = Path(shutil.copytree(tiny_graph_dir, tmp_path / "graph"))
    edit_config(copy, **changes)
    assert next(iter(changes)) in refusal(load_graph, copy)


def test_a_tokenizer_is_wanted_beside_the_model(tmp_path, damaged, tiny_llama_dir):
    assert load_tokenizer(str(tiny_llama_dir)).bos_token_id == 0
    assert "tokenizer" in refusal(load_tokenizer, tmp_path / "absent")
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (damaged / name).unlink()
    assert "tokenizer" in refusal(load_tokenizer, damaged)
    (damaged / "tokenizer.json").write_text("{")
    assert "tokenizer" in refusal(load_tokenizer, damaged)


@pytest.mark.parametrize("load", [load_dense, load_graph, load_causal_lm])
@pytest.mark.parametrize("precision, dtype", [("fp32", torch.float32), ("bf16", torch.bfloat16)])
def test_a_precision_is_a_dtype(tiny_llama_dir, tiny_graph_dir, load, precision, dtype):
    model = load(str(tiny_llama_dir if load is load_dense else tiny_graph_dir), precision=precision)
    exact = ("router.weight", "edge_gain", "edge_affinity", "output_gain")
    assert {value.dtype for name, value in model.named_parameters() if not name.endswith(exact)} == {dtype}
    assert all(
        value.dtype == torch.float32 for name, value in model.named_parameters() if name.endswith(exact)
    )


def four_bit(model) -> set[str]:
    return {name for name, module in model.named_modules() if isinstance(module, NF4Linear)}


def dequantized(model) -> dict[str, torch.Tensor]:
    """The state of a dense 4-bit model, its weights dequantized."""
    packed = {f"{name}.weight": weight_of(model.get_submodule(name)) for name in four_bit(model)}
    return {
        name: packed.get(name, value) for name, value in model.state_dict().items() if "weight." not in name
    }


@pytest.mark.parametrize("load", [load_dense, load_causal_lm])
def test_a_dense_model_in_four_bits(tmp_path, load):
    # 96 is no multiple of the 64 entries that share a scale, 16 rows of keys and values none of 32.
    dense = tiny_llama(intermediate_size=96)
    dense.save_pretrained(tmp_path)
    model = load(str(tmp_path), precision="nf4", dtype=torch.float32)
    assert len(four_bit(model)) == 2 * 7 and not model.training
    assert not any("lm_head" in name for name in four_bit(model))
    ids = random_ids(model)
    assert logit_difference(model, dense, ids) > 1e-2
    error = (
        weight_of(model.model.layers[0].mlp.down_proj) - dense.model.layers[0].mlp.down_proj.weight
    ).norm()
    assert error < 0.1 * dense.model.layers[0].mlp.down_proj.weight.norm()
    dense.load_state_dict(dequantized(model))
    assert logit_difference(model, dense, ids) < 1e-4


def test_a_dense_model_in_four_bits_names_what_is_missing(damaged):
    tensors = load_file(damaged / "model.safetensors")
    del tensors["model.layers.1.mlp.up_proj.weight"]
    save_file(tensors, damaged / "model.safetensors", metadata={"format": "pt"})
    assert "model.layers.1.mlp.up_proj.weight" in refusal(lambda s: load_dense(s, precision="nf4"), damaged)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_a_graph_in_four_bits(tiny_graph_dir, dtype):
    model, graph = load_graph(str(tiny_graph_dir), precision="nf4", dtype=dtype), load_graph(
        str(tiny_graph_dir)
    )
    assert type(model) is FedGraftForCausalLM and not model.training
    assert len(four_bit(model)) == 2 * (4 * 2 + 4)
    assert model.model.embed_tokens.weight.dtype == dtype
    layer = model.expert_layers()[0]
    assert layer.router.weight.dtype == torch.float32 and layer.gate_up_proj.numel() == 0
    for one, other in zip(layer.read_expert(1), graph.expert_layers()[0].read_expert(1), strict=True):
        assert (one - other).norm() < 0.12 * other.norm()
    assert torch.isfinite(model(input_ids=random_ids(graph)).logits).all()
    assert load_causal_lm(str(tiny_graph_dir), precision="nf4").expert_layers()[1].storage.held == [
        0,
        1,
        2,
        3,
    ]


def test_what_four_bits_compute_in_suits_the_device(monkeypatch, tiny_graph_dir):
    monkeypatch.setattr("models.checkpoints.load.compute_dtype", lambda device: torch.bfloat16)
    assert load_graph(str(tiny_graph_dir), precision="nf4").expert_layers()[0].storage.dtype == torch.bfloat16


@pytest.mark.parametrize("half_is_faster", [True, False])
def test_auto_widens_16_bits_where_fp32_is_faster(monkeypatch, tmp_path, tiny_graph_dir, half_is_faster):
    monkeypatch.setattr("models.runtime.precision.beats_fp32", lambda dtype, device: half_is_faster)
    half = cast_weights(load_graph(str(tiny_graph_dir)), torch.bfloat16)
    save_checkpoint(half, load_tokenizer(str(tiny_graph_dir)), tmp_path)
    for load in (load_graph, load_causal_lm):
        opened = load(str(tmp_path), precision="auto")
        assert opened.dtype == (torch.bfloat16 if half_is_faster else torch.float32)
        assert opened.config.dtype == torch.bfloat16
        assert all(
            torch.equal(a.float(), b.float())
            for a, b in zip(opened.parameters(), half.parameters(), strict=True)
        )
    assert load_graph(str(tiny_graph_dir), precision="auto").dtype == torch.float32
    assert load_graph(str(tmp_path), precision="bf16").dtype == torch.bfloat16
    assert load_graph(str(tmp_path)).dtype == torch.bfloat16


@pytest.mark.parametrize("precision", ["int8", "nf", ""])
def test_a_precision_that_is_not_known(tiny_llama_dir, tiny_graph_dir, precision):
    for load, source in ((load_dense, tiny_llama_dir), (load_graph, tiny_graph_dir)):
        assert "auto, fp32, bf16 or nf4" in refusal(lambda s, load=load: load(s, precision=precision), source)
