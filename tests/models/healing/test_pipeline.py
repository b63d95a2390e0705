from __future__ import annotations

from dataclasses import replace

import pytest
import torch

from configs.errors import UserError
from models.bootstrap.build import BootstrapOptions
from models.bootstrap.pipeline import bootstrap_checkpoint
from models.bootstrap.recipe import RECIPE_NAME
from models.bootstrap.recipe_build import check_base
from models.checkpoints.load import load_dense, load_graph
from models.healing import pipeline
from models.healing.options import HealingOptions
from models.healing.pipeline import HealingText, check_pair, heal_checkpoint, state_path
from models.runtime.perplexity import evaluate_loss
from tests.conftest import tiny_llama
from tests.support.command import tree

OPTIONS = HealingOptions(steps=12, learning_rate=3e-3, batch_size=8, save_seconds=0.0)


@pytest.fixture(scope="module")
def pair(tmp_path_factory, tiny_llama_dir):
    """A graph of 8 experts, 4 a token, with default outputs; its dense base; training and held-out text."""
    graph = tmp_path_factory.mktemp("healing") / "graph"
    options = BootstrapOptions(num_experts=8, router="contribution", default_rank=2)
    bootstrap_checkpoint(
        source=str(tiny_llama_dir),
        out=graph,
        options=options,
        calibration_ids=None,
        calibration_tokens=1024,
        evaluation_tokens=512,
        report="none",
    )
    generator = torch.Generator().manual_seed(0)
    dense = load_dense(str(tiny_llama_dir))
    torch.manual_seed(0)
    start = torch.randint(2, 64, (40, 1), generator=generator)
    ids = dense.generate(start, do_sample=True, top_k=0, max_length=32, min_length=32)
    return str(graph), str(tiny_llama_dir), HealingText(ids[:32], ids[:32], ids[32:], ids[32:])


def heal(pair, out, options=OPTIONS, **more):
    graph, base, text = pair
    return heal_checkpoint(graph=graph, base=base, text=text, out=out, options=options, **more)


def test_held_out_loss_falls_and_the_report_is_that_of_the_written_graph(pair, tmp_path):
    result = heal(pair, tmp_path / "healed")
    perplexity = result["perplexity"]
    assert perplexity["dense"] < perplexity["after"] < 0.99 * perplexity["before"]
    assert result["logit_difference"]["before"] < 1e-5 < 1e-3 < result["logit_difference"]["after"]
    healed, text = load_graph(str(tmp_path / "healed")), pair[2]
    measured = evaluate_loss(healed, text.held_out_ids, text.held_out_labels).perplexity
    assert measured == pytest.approx(perplexity["after"], rel=1e-6)
    assert healed.config.experts_per_token == 4 and not state_path(tmp_path / "healed").exists()
    assert result["tokens"] == 12 * 8 * 32 and len(result["losses"]) == result["steps"] == 12


def test_the_written_graph_has_the_dtype_of_the_given_one_and_its_perplexity(pair, tmp_path, tiny_tokenizer):
    graph = load_graph(pair[0]).bfloat16()
    graph.config.dtype = torch.bfloat16
    graph.save_pretrained(tmp_path / "half")
    tiny_tokenizer.save_pretrained(tmp_path / "half")
    result = heal((str(tmp_path / "half"), *pair[1:]), tmp_path / "healed")
    healed, text = load_graph(str(tmp_path / "healed")), pair[2]
    assert healed.dtype == torch.bfloat16
    measured = evaluate_loss(healed.float(), text.held_out_ids, text.held_out_labels).perplexity
    assert measured == pytest.approx(result["perplexity"]["after"], rel=1e-5)


def test_a_killed_run_continues_bit_for_bit(pair, tmp_path, monkeypatch):
    whole = heal(pair, tmp_path / "whole")

    def killed(*_, **__):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(pipeline, "save_checkpoint", killed)
        with pytest.raises(KeyboardInterrupt):
            heal(pair, tmp_path / "out" / "new", replace(OPTIONS, steps=12))
    assert [path.name for path in (tmp_path / "out").iterdir()] == [state_path(tmp_path / "new").name]
    with pytest.raises(UserError, match="learning_rate"):
        heal(pair, tmp_path / "out" / "new", replace(OPTIONS, learning_rate=1e-3))
    result = heal(pair, tmp_path / "out" / "new")
    assert result["losses"] == whole["losses"] and result["perplexity"] == whole["perplexity"]
    assert tree(tmp_path / "out" / "new") == tree(tmp_path / "whole")


def test_a_healed_graph_has_no_recipe_and_no_base(pair, tmp_path):
    heal(pair, tmp_path / "healed", replace(OPTIONS, steps=1))
    check_base(pair[1], pair[0])
    assert not (tmp_path / "healed" / RECIPE_NAME).exists()
    with pytest.raises(UserError, match="give the clients the graph folder"):
        check_base(pair[1], str(tmp_path / "healed"))


def test_another_dense_model_of_the_same_shape_is_a_warning(pair, tmp_path, tiny_tokenizer):
    other = tiny_llama()
    other.lm_head.weight.data *= 1.1
    other.save_pretrained(tmp_path / "other")
    with pytest.warns(UserWarning, match="other weights"):
        heal((pair[0], str(tmp_path / "other"), pair[2]), tmp_path / "healed", replace(OPTIONS, steps=1))


@pytest.mark.parametrize(
    ("shape", "named"),
    [
        ({"vocab_size": 80}, "vocab_size = 64"),
        ({"hidden_size": 64}, "hidden_size = 32"),
        ({"num_hidden_layers": 3}, "num_hidden_layers = 2"),
    ],
)
def test_a_base_of_another_shape_is_refused(pair, tmp_path, shape, named):
    tiny_llama(**shape).save_pretrained(tmp_path / "other")
    with pytest.raises(UserError, match=named):
        check_pair(pair[0], str(tmp_path / "other"))


def test_models_in_each_others_place_and_an_output_that_exists_are_refused(pair, tmp_path):
    graph, base, text = pair
    with pytest.raises(UserError, match="expected an expert graph"):
        heal((base, base, text), tmp_path / "new")
    with pytest.raises(UserError, match="expected a dense model"):
        heal((graph, graph, text), tmp_path / "new")
    (tmp_path / "new").mkdir()
    (tmp_path / "new" / "file").touch()
    with pytest.raises(UserError, match="empty output directory"):
        heal(pair, tmp_path / "new")
    assert [path.name for path in tmp_path.rglob("*")] == ["new", "file"]


def test_too_little_room_for_the_result_is_refused_before_the_training(
    pair, tmp_path, little_room, monkeypatch
):
    monkeypatch.setattr(pipeline, "distill", None)
    with pytest.raises(UserError, match="MiB free on the file system of .*new"):
        heal(pair, tmp_path / "new")
    assert list(tmp_path.iterdir()) == []


def test_the_state_of_a_directory_that_cannot_be_renamed_is_in_the_cache(tmp_path, monkeypatch):
    monkeypatch.setenv("FEDGRAFT_CACHE", str(tmp_path / "cache"))
    (tmp_path / "out").mkdir()
    assert state_path(tmp_path / "out").parent == tmp_path
    monkeypatch.setattr(pipeline, "staging_parent", lambda path: path)
    found = {state_path(tmp_path / name) for name in ("out", "other")}
    assert len(found) == 2 and {path.parent for path in found} == {tmp_path / "cache" / "healing"}
