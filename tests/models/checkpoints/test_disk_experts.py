from __future__ import annotations

import gc
import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from configs.errors import UserError
from models.checkpoints.disk_experts import GraphFiles, materialize, open_mapped
from models.checkpoints.load import load_graph
from models.checkpoints.save import save_checkpoint
from models.graph.unit_vectors import add_to_unit, read_unit, unit_sizes
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import graph_of, logit_difference, random_ids, with_random_gains


class Moved(dict):
    """Experts that moved, in memory."""

    def read(self, unit):
        return self.get(unit)

    def write(self, unit, weights):
        self[unit] = weights


@pytest.fixture
def source(tmp_path, tiny_tokenizer) -> str:
    directory = tmp_path / "graph"
    directory.mkdir()
    save_checkpoint(with_random_gains(graph_of(visits=3)), tiny_tokenizer, directory)
    return str(directory)


def test_a_mapped_graph_computes_what_the_whole_one_does_and_holds_no_expert(source):
    mapped, whole = open_mapped(source), load_graph(source, dtype=torch.float32)
    assert logit_difference(mapped, whole, random_ids(whole)) < 1e-5
    assert all(layer.gate_up_proj.numel() == layer.down_proj.numel() == 0 for layer in mapped.expert_layers())
    whole_size, skeleton = (sum(p.numel() for p in model.parameters()) for model in (whole, mapped))
    assert whole_size - skeleton == 2 * 3 * 64 * 32
    assert mapped.generation_config.bos_token_id == whole.generation_config.bos_token_id == 0


def test_gradients_reach_routers_gains_and_what_lies_below(source):
    """Experts are read a second time in the backward pass, which must change nothing."""
    models = open_mapped(source), load_graph(source, dtype=torch.float32)
    ids = random_ids(models[0])
    for model in models:
        model(input_ids=ids, labels=ids, use_cache=False).loss.backward()
    mapped, whole = (dict(model.named_parameters()) for model in models)
    compared = [name for name in mapped if "gate_up_proj" not in name and "down_proj" not in name]
    assert {"router.weight", "edge_gain"} <= {name.partition(".mlp.")[2] for name in compared}
    for name in compared:
        torch.testing.assert_close(mapped[name].grad, whole[name].grad, rtol=1e-3, atol=1e-6)


def test_experts_that_moved_are_read_where_they_are(source):
    moved = Moved()
    mapped, whole = open_mapped(source, moved), load_graph(source, dtype=torch.float32)
    step = torch.full((unit_sizes(whole)[0, 2],), 0.01)
    for model in (mapped, whole):
        add_to_unit(model, (0, 2), step)
    assert set(moved) == {(0, 2)}
    assert torch.equal(read_unit(mapped, (0, 2)), read_unit(whole, (0, 2)))
    assert logit_difference(mapped, whole, random_ids(whole)) < 1e-5
    with pytest.raises(ValueError, match="for reading only"):
        add_to_unit(open_mapped(source), (0, 2), step)


def test_residents_alone_are_materialized(source):
    mapped, whole = open_mapped(source), load_graph(source, dtype=torch.float32)
    held = [torch.tensor([False, True, False, True]), torch.tensor([True, False, False, False])]
    materialize(mapped, held)
    for layer, full, resident in zip(mapped.expert_layers(), whole.expert_layers(), held, strict=True):
        full.resident = resident
        assert torch.equal(layer.gate_up_proj, full.gate_up_proj[resident]) and layer.storage is None
        assert torch.equal(layer.down_proj, full.down_proj[resident])
    assert logit_difference(mapped, whole, random_ids(whole)) < 1e-5
    assert torch.equal(read_unit(mapped, (0, 3)), read_unit(whole, (0, 3)))
    with pytest.raises(ValueError, match="layer 0 does not hold expert 0"):
        read_unit(mapped, (0, 0))


def test_everything_materialized_is_the_whole_graph_bit_for_bit(source):
    mapped, whole = open_mapped(source), load_graph(source, dtype=torch.float32)
    materialize(mapped, [None, None])
    left, right = mapped.state_dict(), whole.state_dict()
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)


def test_a_checkpoint_in_bf16_and_in_several_files_opens_in_fp32(tmp_path, tiny_tokenizer):
    graph = graph_of(tiny_llama(tie_word_embeddings=True)).to(torch.bfloat16)
    graph.save_pretrained(tmp_path / "sharded", max_shard_size="20KB")
    assert len(list((tmp_path / "sharded").glob("*.safetensors"))) > 1
    mapped = open_mapped(str(tmp_path / "sharded"))
    assert {p.dtype for p in mapped.parameters()} == {torch.float32}
    assert mapped.lm_head.weight is mapped.model.embed_tokens.weight
    whole = load_graph(str(tmp_path / "sharded"), dtype=torch.float32)
    assert logit_difference(mapped, whole, random_ids(whole)) < 1e-5


def test_files_are_mapped_only_while_they_are_read(source):
    files = GraphFiles(source)
    gate_up, down = files.expert(1, 3)
    stored = load_file(f"{source}/model.safetensors")
    assert torch.equal(gate_up, stored["model.layers.1.mlp.gate_up_proj"][3])
    assert torch.equal(down, stored["model.layers.1.mlp.down_proj"][3])
    assert files.shape("model.layers.1.mlp.router") == [4, 32] and "lm_head.weight" in files.names()
    del gate_up, down, stored
    gc.collect()
    with open("/proc/self/maps") as maps:
        assert source not in maps.read()


@pytest.mark.parametrize("damage", ["no such folder", "other config", "missing tensor", "dense"])
def test_what_cannot_be_opened_is_said_in_one_line(source, tiny_llama_dir, tmp_path, damage):
    weights = f"{source}/model.safetensors"
    if damage == "no such folder":
        shutil.rmtree(source)
    elif damage == "other config":
        path = Path(source, "config.json")
        config = json.loads(path.read_text()) | {"num_experts": [8, 4], "expert_size": 8}
        path.write_text(json.dumps(config))
    elif damage == "missing tensor":
        tensors = load_file(weights)
        del tensors["model.layers.0.mlp.router"]
        save_file(tensors, weights, metadata={"format": "pt"})
    else:
        source = str(tiny_llama_dir)
    with pytest.raises(UserError, match="^expected [^\n]*$"):
        open_mapped(source)
