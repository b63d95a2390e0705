from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from models.checkpoints.save import save_checkpoint
from models.moe_files.layout import read_moe_layout
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of
from tests.support.tiny_moes import FAMILIES, saved_moe, tiny_moe

EXPERTS = {"mixtral": 4, "qwen2_moe": 6, "qwen3_moe": 8, "olmoe": 5, "granitemoe": 4, "granitemoeshared": 4}
EXPERTS |= {"deepseek_v3": 6, "glm4_moe": 6}


def rewrite(source: Path, change) -> None:
    """Apply ``change`` to the weights of a checkpoint."""
    values = load_file(source / "model.safetensors")
    change(values)
    save_file(values, source / "model.safetensors", {"format": "pt"})


def set_config(source: Path, **values) -> None:
    path = source / "config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


@pytest.mark.parametrize("original", [True, False], ids=["hub-names", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_every_tensor_of_an_expert_is_found(tmp_path, family, original):
    tiny_moe(family).save_pretrained(tmp_path, save_original_format=original)
    layout = read_moe_layout(tmp_path)
    assert layout.experts_per_layer == [EXPERTS[family]] * 2
    dense_first = family in ("deepseek_v3", "glm4_moe")
    assert layout.decoder_layers == ([1, 2] if dense_first else [0, 1]) and layout.model_type == family
    stored = load_file(tmp_path / "model.safetensors")
    assert list(layout.tensors) and set(layout.tensors) == set(stored)
    for layer in layout.layers:
        own = [name for names in layer.own.values() for name in names]
        found = {*own, *layer.fused}
        names = {name for name in stored if f".layers.{layer.decoder_layer}." in name}
        shared = {name for name in names if ".shared_" in name}
        assert found | set(layer.rows) == {name for name in names if "mlp" in name or "moe" in name} - shared
        assert [stored[name].shape[0] for name in layer.rows] == [EXPERTS[family]] * (1 + dense_first)
        assert layer.pairs == () and layer.rows[0].endswith("weight")
        if layer.fused:
            gate_up, down = (stored[name] for name in layer.fused)
            assert gate_up.shape[1] == 2 * down.shape[2] and gate_up.shape[2] == down.shape[1] == 32
        for gate, up, down in layer.own.values():
            assert stored[gate].shape == stored[up].shape == stored[down].T.shape
            assert any(part in gate for part in (".gate_proj.", ".w1.")) and any(
                part in up for part in (".up_proj.", ".w3.")
            )


def test_the_tensors_of_our_graph_are_found(tmp_path, tiny_tokenizer):
    save_checkpoint(graph_of(), tiny_tokenizer, tmp_path)
    layout = read_moe_layout(tmp_path)
    assert layout.experts_per_layer == [4, 4] and layout.family.per_layer
    prefix = "model.layers.1.mlp."
    layer = layout.layers[1]
    assert layer.fused == (f"{prefix}gate_up_proj", f"{prefix}down_proj")
    assert layer.rows == (f"{prefix}router", f"{prefix}output_gain", f"{prefix}neurons")
    assert layer.pairs == (f"{prefix}edge_gain", f"{prefix}edge_affinity", f"{prefix}edges")
    rest = set(layout.tensors) - {
        name for each in layout.layers for name in (*each.fused, *each.rows, *each.pairs)
    }
    assert not [name for name in rest if ".mlp." in name]


def test_shards_are_one_checkpoint(tmp_path):
    tiny_moe("olmoe").save_pretrained(tmp_path, max_shard_size="10KB")
    layout = read_moe_layout(tmp_path)
    assert layout.experts_per_layer == [5, 5]
    assert len({tensor.path for tensor in layout.tensors.values()}) > 2


def test_many_experts_are_sorted_by_number(tmp_path, tiny_tokenizer):
    source = saved_moe("olmoe", tmp_path, tiny_tokenizer, num_experts=12)
    assert list(read_moe_layout(source).layers[0].own) == list(range(12))


def test_a_dense_model_and_a_family_without_a_table_are_refused(tmp_path, tiny_llama_dir, tiny_tokenizer):
    with pytest.raises(UserError, match="mixture of experts of type fedgraft, mixtral.*got 'llama'"):
        read_moe_layout(tiny_llama_dir)
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    set_config(source, model_type="gpt_oss")
    with pytest.raises(UserError, match="got 'gpt_oss'"):
        read_moe_layout(source)


def test_a_moe_type_without_any_expert_is_refused(tmp_path):
    tiny_llama().save_pretrained(tmp_path)
    set_config(tmp_path, model_type="qwen3_moe", num_experts=8)
    with pytest.raises(UserError, match="no layer with experts"):
        read_moe_layout(tmp_path)


def test_quantized_weights_are_refused(tmp_path, tiny_tokenizer):
    source = saved_moe("deepseek_v3", tmp_path, tiny_tokenizer)
    set_config(source, quantization_config={"quant_method": "fp8"})
    with pytest.raises(UserError, match="not quantized"):
        read_moe_layout(source)


@pytest.mark.parametrize("text", [None, "{", "[]", "{}"])
def test_a_folder_without_a_configuration_is_refused(tmp_path, text):
    if text is not None:
        (tmp_path / "config.json").write_text(text)
    with pytest.raises(UserError, match="expected a"):
        read_moe_layout(tmp_path)


BLOCK = "model.layers.0.mlp."


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda values: values.pop(f"{BLOCK}experts.2.up_proj.weight"), "incomplete"),
        (
            lambda values: [
                values.pop(f"{BLOCK}experts.7.{part}_proj.weight") for part in ("gate", "up", "down")
            ],
            "0 to 7",
        ),
        (lambda values: values.pop(f"{BLOCK}gate.weight"), "incomplete"),
        (lambda values: values.update({f"{BLOCK}gate.weight": torch.zeros(7, 32)}), "experts 0 to 6"),
        (
            lambda values: values.update({f"{BLOCK}experts.0.gate_proj.scale": torch.zeros(1)}),
            "gate_proj.scale",
        ),
        (
            lambda values: values.update({f"{BLOCK}gate.bias": torch.zeros(8)}),
            "got model.layers.0.mlp.gate.bias",
        ),
        (
            lambda values: values.update({f"{BLOCK}experts.gate_up_proj": torch.zeros(8, 32, 32)}),
            "incomplete",
        ),
        (
            lambda values: values.update({"model.layers.0.moe.experts.0.w1.weight": torch.zeros(2)}),
            "in mlp of a layer",
        ),
        (
            lambda values: values.update({"model.layers.2.mlp.gate.weight": torch.zeros(8, 32)}),
            "expected 2 layers",
        ),
    ],
)
def test_other_tensors_than_those_of_the_family_are_refused(tmp_path, tiny_tokenizer, change, message):
    source = saved_moe("qwen3_moe", tmp_path, tiny_tokenizer)
    rewrite(source, change)
    with pytest.raises(UserError, match=message):
        read_moe_layout(source)


def test_fused_tensors_that_disagree_on_their_experts_are_refused(tmp_path, tiny_tokenizer):
    source = saved_moe("granitemoeshared", tmp_path, tiny_tokenizer)
    name = "model.layers.1.block_sparse_moe.output_linear.weight"
    rewrite(source, lambda values: values.update({name: values[name][:3].clone()}))
    with pytest.raises(UserError, match="expected 4 experts in .*output_linear.weight, got shape"):
        read_moe_layout(source)


def test_counts_come_from_every_layer(tmp_path, tiny_tokenizer):
    source = saved_moe("granitemoeshared", tmp_path, tiny_tokenizer)

    def drop_last_expert(values):
        for name in [name for name in values if ".1.block_sparse_moe" in name]:
            values[name] = values[name][:3].clone()

    rewrite(source, drop_last_expert)
    with pytest.raises(UserError, match=r"num_local_experts of config.json .*\[4, 3\], got 4"):
        read_moe_layout(source)


def test_a_configuration_with_another_count_is_refused(tmp_path, tiny_tokenizer):
    source = saved_moe("olmoe", tmp_path, tiny_tokenizer)
    set_config(source, num_experts=64)
    with pytest.raises(UserError, match=r"num_experts of config.json .*\[5, 5\], got 64"):
        read_moe_layout(source)
    set_config(source, num_experts=[5, 5])
    with pytest.raises(UserError, match=r"got \[5, 5\]"):
        read_moe_layout(source)
    set_config(source, num_experts=None)
    assert read_moe_layout(source).experts_per_layer == [5, 5]


def test_layers_of_our_graph_may_differ(tmp_path, tiny_tokenizer):
    save_checkpoint(graph_of(), tiny_tokenizer, tmp_path)
    set_config(tmp_path, num_experts=[4, 3])
    with pytest.raises(UserError, match=r"\[4, 4\], got \[4, 3\]"):
        read_moe_layout(tmp_path)
