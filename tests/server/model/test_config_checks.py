from __future__ import annotations

from types import SimpleNamespace

import pytest

from configs.errors import UserError
from server.model.config_checks import check_fit, check_room
from tests.support.tiny_federation import tiny_config


def test_what_fits_passes(tiny_graph_dir, tmp_path):
    config = tiny_config(tiny_graph_dir, tmp_path)
    check_fit(
        config.model_copy(update={"budgets": "4,1", "experts_per_token": 1, "block_size": 128}),
        str(tiny_graph_dir),
    )


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"budgets": "5,1"}, "budgets to be at most the graph's 4 experts per layer, got 5"),
        ({"experts_per_token": 5}, "experts-per-token to be at most the graph's 4 experts per layer, got 5"),
        ({"block_size": 129}, "block-size to be at most the graph's 128 tokens of context, got 129"),
    ],
)
def test_what_does_not_fit_is_refused_with_its_key(tiny_graph_dir, tmp_path, changes, words):
    config = tiny_config(tiny_graph_dir, tmp_path).model_copy(update=changes)
    with pytest.raises(UserError, match=words):
        check_fit(config, str(tiny_graph_dir))


@pytest.mark.parametrize("changes", [{"budgets": "4,1"}, {"experts_per_token": 1}])
def test_shared_experts_fit_every_budget_and_every_token(shared_graph_dir, tmp_path, changes):
    config = tiny_config(shared_graph_dir, tmp_path)
    check_fit(config.model_copy(update={"budgets": "2,8", "experts_per_token": 2}), str(shared_graph_dir))
    key = next(iter(changes)).replace("_", "-")
    with pytest.raises(
        UserError, match=f"{key} to be at least the graph's 2 shared experts per layer.*got 1"
    ):
        check_fit(config.model_copy(update=changes), str(shared_graph_dir))


def test_a_dense_model_is_no_graph(tiny_llama_dir, tiny_graph_dir, tmp_path):
    with pytest.raises(UserError, match="expected an expert graph, got a model of type 'llama'"):
        check_fit(tiny_config(tiny_graph_dir, tmp_path), str(tiny_llama_dir))


@pytest.mark.parametrize(
    ("changes", "models"),
    [
        ({}, 4),  # out, the best and the checkpoints of rounds 2 and 4
        ({"num_rounds": 6}, 5),
        ({"num_rounds": 6, "out": ""}, 3),
        ({"num_rounds": 6, "keep_best": False}, 4),
        ({"num_rounds": 600, "log_dir": ""}, 1),
        ({"num_rounds": 600, "keep_checkpoints": 3}, 6),
        ({"num_rounds": 6, "keep_checkpoints": 3}, 5),
        ({"num_rounds": 600, "checkpoint_every": 0}, 2),
    ],
)
def test_room_is_needed_for_last_and_best_model_and_for_every_checkpoint(
    tiny_graph_dir, tmp_path, monkeypatch, changes, models
):
    size = (tiny_graph_dir / "model.safetensors").stat().st_size
    own = {
        "num_rounds": 5,
        "checkpoint_every": 2,
        "keep_checkpoints": 0,
        "out": str(tmp_path / "out"),
        **changes,
    }
    config = tiny_config(tiny_graph_dir, tmp_path).model_copy(update=own)
    free = SimpleNamespace(free=models * size)
    monkeypatch.setattr("configs.output.shutil.disk_usage", lambda path: free)
    check_room(config, str(tiny_graph_dir))
    free.free -= 1
    with pytest.raises(UserError, match="MiB free"):
        check_room(config, str(tiny_graph_dir))
