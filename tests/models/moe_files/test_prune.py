from __future__ import annotations

import json
import warnings
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from configs.errors import UserError
from models.checkpoints.load import load_graph
from models.checkpoints.save import cast_weights, save_checkpoint
from models.graph.graph_state import check_graph, read_graph
from models.moe_files.layout import read_moe_layout
from models.moe_files.prune import preview_prune, prune_checkpoint
from tests.models.export.dense_export import export_dense
from tests.support.command import tree
from tests.support.tiny_graphs import graph_of, logit_difference, random_ids, with_random_gains
from tests.support.tiny_moes import FAMILIES, saved_moe, tiny_moe

KEEP = {0: np.array([3, 1, 0]), 1: np.array([0, 2, 3])}
COUNT_KEY = {
    family: next(
        key for key in ("num_local_experts", "num_experts", "n_routed_experts") if key in FAMILIES[family][1]
    )
    for family in FAMILIES
}
OF_EXPERTS = (".experts.", "gate.weight", "router.weight", "e_score_correction_bias")


def tensors_of(directory: Path) -> dict[str, torch.Tensor]:
    return {
        name: value for file in directory.glob("*.safetensors") for name, value in load_file(file).items()
    }


def same_tensors(one: dict[str, torch.Tensor], other: dict[str, torch.Tensor]) -> bool:
    return set(one) == set(other) and all(
        value.dtype == other[name].dtype and torch.equal(value, other[name]) for name, value in one.items()
    )


def sliced(family: str, keep: dict[int, np.ndarray], **overrides):
    """The tiny model with the experts of ``keep`` alone, made in memory from the fused parameters."""
    whole = tiny_moe(family, **overrides)
    small = tiny_moe(family, **{**overrides, COUNT_KEY[family]: len(keep[0])})
    first = 1 if "first_k_dense_replace" in FAMILIES[family][1] else 0
    state = whole.state_dict()
    for name, value in state.items():
        if any(part in name for part in OF_EXPERTS) and ".shared_expert" not in name:
            state[name] = value[np.sort(keep[int(name.split(".")[2]) - first])]
    small.load_state_dict(state)
    return small


def load(directory: Path):
    """A checkpoint in which no tensor is missing, left over or of another shape."""
    loaded: Any = AutoModelForCausalLM.from_pretrained(directory, output_loading_info=True)
    assert not any(loaded[1].values()), loaded[1]
    return loaded[0].eval()


@pytest.mark.parametrize("original", [True, False], ids=["hub-names", "fused"])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_is_left_computes_what_the_model_without_those_experts_does(tmp_path, family, original):
    tiny_moe(family).save_pretrained(tmp_path / "moe", save_original_format=original)
    report = prune_checkpoint(tmp_path / "moe", tmp_path / "out", KEEP)
    pruned = load(tmp_path / "out")
    expected = sliced(family, KEEP)
    ids = random_ids(pruned)
    assert logit_difference(pruned, expected, ids) <= 1e-5
    assert logit_difference(pruned, tiny_moe(family), ids) > 1e-3
    assert report.parameters_after == sum(value.numel() for value in tensors_of(tmp_path / "out").values())
    assert report.parameters_before - report.parameters_after == sum(
        before.numel() - after.numel()
        for before, after in zip(
            tiny_moe(family).state_dict().values(), expected.state_dict().values(), strict=True
        )
    )
    before, after = (json.loads((tmp_path / name / "config.json").read_text()) for name in ("moe", "out"))
    assert {key for key in before if before[key] != after[key]} <= set(COUNT_KEY.values())
    assert set(before) == set(after) and report.warnings == ()


@pytest.mark.parametrize("family", FAMILIES)
def test_keeping_every_expert_keeps_every_tensor(tmp_path, tiny_tokenizer, family):
    source = saved_moe(family, tmp_path, tiny_tokenizer)
    report = prune_checkpoint(source, tmp_path / "out", {})
    assert same_tensors(tensors_of(source), tensors_of(tmp_path / "out"))
    before, after = (json.loads((where / "config.json").read_text()) for where in (source, tmp_path / "out"))
    assert before == after
    assert report.parameters_before == report.parameters_after
    assert [ids.tolist() for ids in report.keep_map.values()] == [
        list(range(number)) for number in read_moe_layout(source).experts_per_layer
    ]


@pytest.mark.parametrize("family", FAMILIES)
def test_one_expert_may_be_left_and_k_is_clamped_with_a_warning(tmp_path, tiny_tokenizer, family):
    keep = {0: np.array([2]), 1: np.array([0])}
    source = saved_moe(family, tmp_path, tiny_tokenizer)
    if family in ("deepseek_v3", "glm4_moe"):  # their router adds the two best of a group
        with pytest.raises(UserError, match="at least two experts in each of the router's 1 groups"):
            prune_checkpoint(source, tmp_path / "out", keep)
        return
    report = prune_checkpoint(source, tmp_path / "out", keep)
    pruned = load(tmp_path / "out")
    assert pruned.config.num_experts_per_tok == 1
    assert ["from 2 to 1" in text for text in report.warnings] == [True]
    expected = sliced(family, keep, num_experts_per_tok=1)
    assert logit_difference(pruned, expected, random_ids(pruned)) <= 1e-5


@pytest.mark.parametrize("shard", ["20KB", "5KB"])
@pytest.mark.parametrize("family", ["qwen3_moe", "granitemoeshared"])
def test_shards_stay_shards_with_a_new_index(tmp_path, family, shard):
    source, out = tmp_path / "moe", tmp_path / "out"
    tiny_moe(family).save_pretrained(source, max_shard_size=shard)
    names = {path.name for path in source.glob("*.safetensors")}
    assert len(names) > 1
    prune_checkpoint(source, out, KEEP)
    index = json.loads((out / "model.safetensors.index.json").read_text())
    stored = {path.name: load_file(path) for path in out.glob("*.safetensors")}
    assert index["weight_map"] == {name: file for file, values in stored.items() for name in values}
    assert set(stored) <= names and all(stored.values())
    assert index["metadata"]["total_size"] == sum(
        value.nbytes for values in stored.values() for value in values.values()
    )
    pruned = load(out)
    assert logit_difference(pruned, sliced(family, KEEP), random_ids(pruned)) <= 1e-5


def test_a_shard_whose_experts_all_go_is_left_out(tmp_path):
    source, out = tmp_path / "moe", tmp_path / "out"
    tiny_moe("mixtral").save_pretrained(source)
    values = load_file(source / "model.safetensors")
    (source / "model.safetensors").unlink()
    gone = {name: value for name, value in values.items() if ".experts.2." in name}
    save_file(gone, source / "b.safetensors", {"format": "pt"})
    save_file(
        {name: values[name] for name in values.keys() - gone}, source / "a.safetensors", {"format": "pt"}
    )
    weight_map = {name: "b.safetensors" if name in gone else "a.safetensors" for name in values}
    (source / "model.safetensors.index.json").write_text(
        json.dumps({"metadata": {}, "weight_map": weight_map})
    )
    keep = {0: np.array([0, 1, 3]), 1: np.array([0, 1, 3])}
    prune_checkpoint(source, out, keep)
    assert [path.name for path in out.glob("*.safetensors")] == ["a.safetensors"]
    assert logit_difference(load(out), sliced("mixtral", keep), random_ids(load(out))) <= 1e-5


@pytest.mark.parametrize("overrides", [{"tie_word_embeddings": True}, {"attention_bias": True}])
def test_what_is_not_of_the_experts_stays(tmp_path, tiny_tokenizer, overrides):
    source = saved_moe("qwen3_moe", tmp_path, tiny_tokenizer, **overrides)
    prune_checkpoint(source, tmp_path / "out", KEEP)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    rest = {name: value for name, value in before.items() if ".mlp." not in name}
    assert same_tensors(rest, {name: value for name, value in after.items() if ".mlp." not in name})
    pruned = load(tmp_path / "out")
    assert logit_difference(pruned, sliced("qwen3_moe", KEEP, **overrides), random_ids(pruned)) <= 1e-5


def test_dtypes_stay_tensor_by_tensor(tmp_path):
    model = tiny_moe("deepseek_v3").to(torch.bfloat16)
    for name, values in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            values.data = values.data.float()
    model.save_pretrained(tmp_path / "moe")
    prune_checkpoint(tmp_path / "moe", tmp_path / "out", KEEP)
    before, after = tensors_of(tmp_path / "moe"), tensors_of(tmp_path / "out")
    assert {value.dtype for value in before.values()} == {torch.bfloat16, torch.float32}
    assert all(after[name].dtype == before[name].dtype for name in after)
    for layer, kept in ((1, KEEP[0]), (2, KEEP[1])):
        for new, old in enumerate(np.sort(kept)):
            for part in ("gate_proj", "up_proj", "down_proj"):
                name = f"model.layers.{layer}.mlp.experts.{{}}.{part}.weight"
                assert torch.equal(after[name.format(new)], before[name.format(old)])


def test_routing_groups_are_kept_or_refused(tmp_path, tiny_tokenizer):
    groups = {"n_routed_experts": 8, "n_group": 2, "topk_group": 1}
    source = saved_moe("deepseek_v3", tmp_path, tiny_tokenizer, **groups)
    even = {0: np.array([0, 3, 5, 6]), 1: np.array([1, 2, 4, 7])}
    report = prune_checkpoint(source, tmp_path / "out", even)
    assert report.warnings == ()
    pruned = load(tmp_path / "out")
    assert logit_difference(pruned, sliced("deepseek_v3", even, **groups), random_ids(pruned)) <= 1e-5
    moved = preview_prune(source, {0: np.array([0, 1, 2, 6]), 1: even[1]})
    assert ["groups in layers 0 have" in text for text in moved.warnings] == [True]
    for count in (7, 2):
        with pytest.raises(UserError, match="router's 2 groups"):
            preview_prune(source, {0: np.arange(count), 1: np.arange(count)})
    tops = saved_moe("deepseek_v3", tmp_path / "k", tiny_tokenizer, **groups, num_experts_per_tok=4)
    assert "from 4 to 2" in preview_prune(tops, even).warnings[0]


def test_layers_that_predict_further_tokens_are_left_out_with_a_warning(tmp_path, tiny_tokenizer):
    source = saved_moe("glm4_moe", tmp_path, tiny_tokenizer)
    values = load_file(source / "model.safetensors")
    further = {
        f"model.layers.3.mlp.experts.{expert}.up_proj.weight": torch.ones(16, 32) for expert in range(6)
    }
    save_file(values | further, source / "model.safetensors", {"format": "pt"})
    report = prune_checkpoint(source, tmp_path / "out", KEEP)
    assert ["6 tensors of layers that predict" in text for text in report.warnings] == [True]
    assert not [name for name in tensors_of(tmp_path / "out") if ".layers.3." in name]
    assert json.loads((tmp_path / "out" / "config.json").read_text())["num_nextn_predict_layers"] == 0
    load(tmp_path / "out")


def test_what_lies_beside_the_weights_goes_along(tmp_path, tiny_tokenizer):
    source, out = saved_moe("mixtral", tmp_path, tiny_tokenizer), tmp_path / "out"
    (source / "chat_template.jinja").write_text("{{ messages }}")
    (source / "modeling_x.py").write_text("x = 1\n")
    (source / "additional_chat_templates").mkdir()
    (source / "additional_chat_templates" / "tool.jinja").write_text("{{ tools }}")
    for name in ("pytorch_model.bin", "pytorch_model.bin.index.json", "consolidated.safetensors", ".cache"):
        (source / name).write_text("other weights")
    (source / "older").mkdir()
    (source / "older" / "config.json").write_text("{}")
    prune_checkpoint(source, out, KEEP)
    beside = {
        "additional_chat_templates",
        "additional_chat_templates/tool.jinja",
        "chat_template.jinja",
        "config.json",
        "generation_config.json",
        "model.safetensors",
        "modeling_x.py",
        "tokenizer.json",
        "tokenizer_config.json",
    }
    files = tree(out)
    assert set(files) == beside
    changed = {"config.json", "model.safetensors"}
    assert {name: files[name] for name in beside - changed} == {
        name: tree(source)[name] for name in beside - changed
    }
    assert AutoTokenizer.from_pretrained(out).bos_token_id == 0


@pytest.mark.parametrize("family", ["mixtral", "granitemoeshared", "fedgraft"])
def test_a_preview_reports_what_pruning_does_and_writes_nothing(tmp_path, tiny_tokenizer, family):
    if family == "fedgraft":
        source = tmp_path / family
        source.mkdir()
        save_checkpoint(graph_of(), tiny_tokenizer, source)
    else:
        source = saved_moe(family, tmp_path, tiny_tokenizer)
    before = tree(tmp_path)
    preview = preview_prune(source, KEEP)
    assert tree(tmp_path) == before and preview.out is None
    report = prune_checkpoint(source, tmp_path / "out", KEEP)
    for name in ("parameters_before", "parameters_after", "bytes_before", "bytes_after", "warnings"):
        assert getattr(preview, name) == getattr(report, name), name
    for where, size in ((source, report.bytes_before), (tmp_path / "out", report.bytes_after)):
        assert (where / "model.safetensors").stat().st_size == size
    assert report.bytes_after < report.bytes_before and report.out == tmp_path / "out"


def test_progress_reaches_its_end(tmp_path, tiny_tokenizer):
    steps = []
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer, hidden_size=256, intermediate_size=512)
    prune_checkpoint(source, tmp_path / "out", KEEP, on_step=lambda *step: steps.append(step))
    assert steps[-1][1] == steps[-1][2] > 3 and len({stage for stage, _, _ in steps}) == 1


@pytest.mark.parametrize(
    ("keep", "message"),
    [
        ({0: np.array([0, 1]), 1: np.array([0, 1, 2])}, "2 in layers 0; 3 in layers 1; set `equalize`"),
        ({0: np.array([0, 1])}, "2 in layers 0; 4 in layers 1"),
        ({0: np.array([], dtype=int), 1: np.array([0])}, "at least one expert"),
        ({0: np.array([4]), 1: np.array([0])}, "experts 0 to 3, got 4"),
        ({0: np.array([-1]), 1: np.array([0])}, "experts 0 to 3, got -1"),
        ({0: np.array([0, 0]), 1: np.array([0, 1])}, "every expert once"),
        ({2: np.array([0])}, "layers 0 to 1, got layer 2"),
    ],
)
def test_a_map_that_does_not_fit_is_refused_and_leaves_nothing(tmp_path, tiny_tokenizer, keep, message):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    before = tree(tmp_path)
    with pytest.raises(UserError, match=message):
        prune_checkpoint(source, tmp_path / "out", keep)
    assert tree(tmp_path) == before


def test_a_failure_while_writing_leaves_nothing(tmp_path, tiny_tokenizer):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    before = tree(tmp_path)

    def stop(*step):
        raise OSError("no space left")

    with pytest.raises(OSError, match="no space"):
        prune_checkpoint(source, tmp_path / "out", KEEP, on_step=stop)
    assert tree(tmp_path) == before


def test_an_output_with_files_is_replaced_only_when_told_even_by_the_source_itself(tmp_path, tiny_tokenizer):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    with pytest.raises(UserError, match="`overwrite`"):
        prune_checkpoint(source, source, KEEP)
    prune_checkpoint(source, source, KEEP, overwrite=True)
    assert logit_difference(load(source), sliced("mixtral", KEEP), random_ids(load(source))) <= 1e-5


def graph_dir(model, tokenizer, directory: Path) -> Path:
    directory.mkdir()
    save_checkpoint(model, tokenizer, directory)
    return directory


def hidden(model, keep: dict[int, np.ndarray]):
    """The whole graph, of whose experts only those of ``keep`` may be visited."""
    for layer, mlp in enumerate(model.expert_layers()):
        mlp.resident = torch.zeros(mlp.num_experts, dtype=torch.bool)
        mlp.resident[np.sort(keep[layer])] = True
    return model


def test_a_graph_whose_removed_experts_bridge_no_edge_equals_the_graph_with_them_not_resident(
    tmp_path, tiny_tokenizer
):
    """Any gains, affinities and output gains: every edge is there (so that none is added), every root open."""
    model = with_random_gains(graph_of(visits=2))
    keep = {0: np.array([0, 2, 3]), 1: np.array([1])}
    report = prune_checkpoint(graph_dir(model, tiny_tokenizer, tmp_path / "graph"), tmp_path / "out", keep)
    pruned = load_graph(str(tmp_path / "out"))
    assert pruned.config.num_experts == [3, 1] and pruned.config.experts_per_token == 2
    assert logit_difference(pruned, hidden(model, keep), random_ids(model)) <= 1e-5
    assert pruned.config.graph_version == model.config.graph_version + 1
    assert [ids.tolist() for ids in report.keep_map.values()] == [[0, 2, 3], [1]]


def test_rewired_edges_start_at_zero_and_then_change_nothing_while_affinities_are_zero(
    tmp_path, tiny_tokenizer
):
    """Gains of the edges that stay may have any value; roots open; affinities zero, so that the walk is top-k."""
    model = with_random_gains(graph_of(visits=2))
    chain = torch.eye(4, dtype=torch.bool) | torch.eye(4, dtype=torch.bool).roll(1, dims=1).triu(1)
    for mlp in model.expert_layers():
        mlp.edges.copy_(chain)
        mlp.edge_affinity.data.zero_()
    keep = {0: np.array([0, 2, 3]), 1: np.array([0, 3])}
    prune_checkpoint(graph_dir(model, tiny_tokenizer, tmp_path / "graph"), tmp_path / "out", keep)
    pruned = load_graph(str(tmp_path / "out"))
    first, second = pruned.expert_layers()
    assert first.edges.tolist() == [[True, True, False], [False, True, True], [False, False, True]]
    assert second.edges.tolist() == [[True, True], [False, True]]
    assert first.edge_gain[0, 1] == 0 and second.edge_gain[0, 1] == 0
    assert first.edge_gain[1, 2] == model.expert_layers()[0].edge_gain[2, 3] != 0
    assert logit_difference(pruned, hidden(model, keep), random_ids(model)) <= 1e-5


def test_an_expert_behind_a_removed_one_stays_within_reach(tmp_path, tiny_tokenizer):
    model = graph_of(visits=2)
    for mlp in model.expert_layers():
        mlp.edges.copy_(torch.eye(4, dtype=torch.bool).roll(1, dims=1).triu(1))
        mlp.edges[0, 0] = True
    keep = {0: np.array([1, 2]), 1: np.array([0, 3])}
    prune_checkpoint(graph_dir(model, tiny_tokenizer, tmp_path / "graph"), tmp_path / "out", keep)
    pruned = load_graph(str(tmp_path / "out"))
    check_graph(pruned)
    assert [mask.tolist() for mask in read_graph(pruned).masks] == [[[True, True], [False, False]]] * 2


def test_keeping_every_expert_of_a_graph_keeps_every_tensor(tmp_path, tiny_tokenizer):
    source = graph_dir(with_random_gains(graph_of(visits=2)), tiny_tokenizer, tmp_path / "graph")
    prune_checkpoint(source, tmp_path / "out", {})
    assert same_tensors(tensors_of(source), tensors_of(tmp_path / "out"))
    assert (tmp_path / "out" / "modeling_fedgraft.py").is_file()


def test_a_pruned_graph_opens_with_its_own_code_and_leaves_as_dense(tmp_path, tiny_tokenizer):
    model = graph_of(visits=4)
    keep = {0: np.array([1, 3]), 1: np.array([2])}
    report = prune_checkpoint(graph_dir(model, tiny_tokenizer, tmp_path / "graph"), tmp_path / "out", keep)
    assert ["from 4 to 2" in text for text in report.warnings] == [True]
    pruned = load_graph(str(tmp_path / "out"))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        foreign = AutoModelForCausalLM.from_pretrained(tmp_path / "out", trust_remote_code=True)
    assert logit_difference(foreign, pruned, random_ids(pruned)) <= 1e-5
    exported = export_dense(pruned)
    assert exported.exact and exported.max_logit_difference < 1e-4
    assert exported.model.config.intermediate_size == 32
    exported.model.save_pretrained(tmp_path / "dense")
    load(tmp_path / "dense")


def test_a_graph_of_bfloat16_keeps_its_exact_gains(tmp_path, tiny_tokenizer):
    model = cast_weights(with_random_gains(graph_of(visits=2)), torch.bfloat16)
    source = graph_dir(model, tiny_tokenizer, tmp_path / "graph")
    prune_checkpoint(source, tmp_path / "out", KEEP)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    assert {name: value.dtype for name, value in before.items()} == {
        name: value.dtype for name, value in after.items()
    }
    assert after["model.layers.0.mlp.edge_gain"].dtype == torch.float32
    assert torch.equal(after["model.layers.1.mlp.neurons"], before["model.layers.1.mlp.neurons"][[0, 2, 3]])


def test_the_key_of_hub_checkpoints_is_rewritten_too(tmp_path, tiny_tokenizer):
    source = saved_moe("qwen3_moe", tmp_path, tiny_tokenizer)
    config = json.loads((source / "config.json").read_text())
    config["num_experts"] = config.pop("num_local_experts")
    (source / "config.json").write_text(json.dumps(config))
    prune_checkpoint(source, tmp_path / "out", KEEP)
    pruned = load(tmp_path / "out")
    assert json.loads((tmp_path / "out" / "config.json").read_text()) == config | {"num_experts": 3}
    assert logit_difference(pruned, sliced("qwen3_moe", KEEP), random_ids(pruned)) <= 1e-5


def test_dense_layers_between_are_left_alone(tmp_path, tiny_tokenizer):
    source = saved_moe("qwen3_moe", tmp_path, tiny_tokenizer, num_hidden_layers=3, mlp_only_layers=[1])
    assert read_moe_layout(source).decoder_layers == [0, 2]
    prune_checkpoint(source, tmp_path / "out", KEEP)
    before, after = tensors_of(source), tensors_of(tmp_path / "out")
    for ordinal, layer in enumerate((0, 2)):
        name = f"model.layers.{layer}.mlp.gate.weight"
        assert torch.equal(after[name], before[name][np.sort(KEEP[ordinal])])
    dense = {name: value for name, value in before.items() if ".layers.1." in name}
    assert same_tensors(dense, {name: value for name, value in after.items() if ".layers.1." in name})
    load(tmp_path / "out")


def test_too_little_room_for_the_new_weights_is_refused(tmp_path, tiny_tokenizer, little_room):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    with pytest.raises(UserError, match="MiB free"):
        prune_checkpoint(source, tmp_path / "out", KEEP)
    assert not (tmp_path / "out").exists()
