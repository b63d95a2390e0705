from __future__ import annotations

import shutil
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from configs.errors import UserError
from experts.graph.expert_graph import reachable
from models.bootstrap import pipeline as module
from models.bootstrap.build import BootstrapOptions
from models.bootstrap.pipeline import bootstrap_checkpoint, graph_bytes, sample_calibration, split_tokens
from models.checkpoints.load import load_dense, load_graph, load_tokenizer
from models.files.fingerprint import fingerprint
from models.graph.graph_state import read_graph
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import logit_difference, random_ids


def run(source: Path, out: Path, *, num_experts: int = 4, plan: dict | None = None, **options) -> dict:
    return bootstrap_checkpoint(
        source=str(source),
        out=out,
        options=BootstrapOptions(num_experts=num_experts, **(plan or {})),
        **{
            "calibration_ids": random_ids(tiny_llama(), 12, 32),
            "calibration_tokens": 256,
            "evaluation_tokens": 128,
            **options,
        },
    )


def test_the_report_has_the_agreed_keys_and_its_files_are_there(tmp_path, tiny_llama_dir):
    stages = []
    report = run(tiny_llama_dir, tmp_path / "graph", on_step=lambda *step: stages.append(step))
    assert set(report) == {
        "out", "experts", "experts_per_token", "clustering", "layers", "perplexity", "logit_difference",
    }  # fmt: skip
    assert 0 <= report["logit_difference"] < 1e-5
    assert report["clustering"] == "flow"
    assert (report["out"], report["experts"], report["experts_per_token"]) == (str(tmp_path / "graph"), 4, 2)
    assert [set(layer) for layer in report["layers"]] == [{"sizes", "inertia", "seconds"}] * 2
    assert all(layer["sizes"] == [16] * 4 and layer["inertia"] > 0 for layer in report["layers"])
    assert set(report["perplexity"]) == {"dense", "75", "50", "25"}
    table = (tmp_path / "graph" / "cluster_stats.txt").read_text()
    assert f"{report['layers'][1]['inertia']:.4f}" in table.splitlines()[2]
    assert [path.name for path in tmp_path.iterdir()] == ["graph"]
    for stage in ("calibration text", "clustering layers", "comparing routers"):
        steps = [(done, total) for name, done, total in stages if name == stage]
        assert steps[-1][0] == steps[-1][1] and [done for done, _ in steps] == sorted(
            done for done, _ in steps
        )


def test_the_checkpoint_is_the_dense_model_cut_into_experts(tmp_path, tiny_llama_dir):
    run(tiny_llama_dir, tmp_path / "graph", plan={"experts_per_token": 4})
    dense, graph = load_dense(str(tiny_llama_dir)), load_graph(str(tmp_path / "graph"))
    assert logit_difference(graph, dense, random_ids(dense)) < 1e-4
    assert graph.config.base_fingerprint == fingerprint(dense) and graph.config.graph_version == 0
    assert all(reachable(mask).all() for mask in read_graph(graph).masks)
    text = "a dog, 3 cats"
    one, other = load_tokenizer(str(tiny_llama_dir)), load_tokenizer(str(tmp_path / "graph"))
    assert one(text)["input_ids"] == other(text)["input_ids"]


def test_the_dtype_of_the_checkpoint_is_kept_and_its_own_fingerprint_taken(tmp_path, tiny_llama_dir):
    source = Path(shutil.copytree(tiny_llama_dir, tmp_path / "source"))
    tiny_llama().to(torch.bfloat16).save_pretrained(source)
    run(source, tmp_path / "graph")
    graph = load_graph(str(tmp_path / "graph"))
    assert graph.dtype == torch.bfloat16 and graph.expert_layers()[0].router.weight.dtype == torch.float32
    assert graph.config.base_fingerprint == fingerprint(load_dense(str(source)))


@pytest.mark.parametrize(
    "plan",
    [{}, {"router": "contribution", "num_shared": 1, "default_rank": 3, "features": "gate-activation"}],
)
def test_a_graph_takes_at_most_the_estimated_bytes(tmp_path, tiny_llama_dir, plan):
    run(tiny_llama_dir, tmp_path / "graph", plan=plan)
    files = [tmp_path / "graph" / name for name in ("model.safetensors", "recipe.safetensors")]
    size = sum(path.stat().st_size for path in files)
    headers = 8192
    assert size - headers <= graph_bytes(str(tiny_llama_dir), BootstrapOptions(4, **plan)) <= 1.05 * size


def test_without_room_for_the_graph_nothing_is_computed_or_written(tmp_path, tiny_llama_dir, monkeypatch):
    needed = graph_bytes(str(tiny_llama_dir), BootstrapOptions(4))
    monkeypatch.setattr("configs.output.shutil.disk_usage", lambda path: SimpleNamespace(free=needed - 1))
    steps = []
    with pytest.raises(UserError, match="MiB free on the file system of .*graph"):
        run(tiny_llama_dir, tmp_path / "graph", on_step=lambda *step: steps.append(step))
    assert steps == [] and list(tmp_path.iterdir()) == []


def test_text_is_sampled_where_none_is_given_and_the_seed_decides(tmp_path, tiny_llama_dir):
    reports = [
        run(tiny_llama_dir, tmp_path / str(index), calibration_ids=None, plan={"seed": seed})
        for index, seed in enumerate((1, 1, 2))
    ]
    figures = [report["perplexity"] for report in reports]
    assert figures[0] == figures[1] != figures[2]
    first, second = (load_graph(str(tmp_path / name)) for name in "01")
    assert fingerprint(first) == fingerprint(second)


def test_sampled_blocks_fit_the_context():
    ids = sample_calibration(tiny_llama(), 300, seed=0)
    assert ids.shape == (3, 128)


@pytest.mark.parametrize(
    "blocks, sizes, expected",
    [
        (10, (64, 32), (4, 2)),  # more than wanted: the rest is left out
        (6, (64, 32), (4, 2)),
        (3, (64, 32), (2, 1)),  # less: the same proportion
        (2, (1000, 10), (1, 1)),
        (2, (10, 1000), (1, 1)),
    ],
)
def test_tokens_are_split_into_calibration_and_held_out(blocks, sizes, expected):
    ids = torch.arange(blocks * 16).view(blocks, 16)
    calibration, held_out = split_tokens(ids, *sizes)
    assert (len(calibration), len(held_out)) == expected
    assert torch.equal(torch.cat([calibration, held_out]), ids[: sum(expected)])


@pytest.mark.parametrize("blocks, sizes", [(0, (64, 32)), (1, (64, 32))])
def test_one_block_cannot_be_split(blocks, sizes):
    with pytest.raises(UserError, match="two blocks"):
        split_tokens(torch.zeros(blocks, 16, dtype=torch.int64), *sizes)


def test_little_text_wanted_of_long_blocks_still_leaves_two():
    calibration, held_out = split_tokens(torch.zeros(5, 256, dtype=torch.int64), 100, 50)
    assert len(calibration) == len(held_out) == 1


@pytest.mark.parametrize("error", [RuntimeError, KeyboardInterrupt])
@pytest.mark.parametrize(
    "stage", ["plan_experts", "baseline_perplexities", "save_checkpoint", "cluster_table"]
)
def test_a_failure_at_any_stage_leaves_nothing(tmp_path, tiny_llama_dir, monkeypatch, stage, error):
    def failing(*args, **options):
        raise error

    monkeypatch.setattr(module, stage, failing)
    with pytest.raises(error):
        run(tiny_llama_dir, tmp_path / "graph")
    assert list(tmp_path.iterdir()) == []


def test_bad_input_is_refused_before_any_weight_is_opened(tmp_path, tiny_llama_dir, monkeypatch):
    monkeypatch.setattr(module, "load_dense", lambda source: pytest.fail("weights were opened"))
    with pytest.raises(UserError, match="divides the FFN width 64, got 5.*4.*8"):
        run(tiny_llama_dir, tmp_path / "graph", num_experts=5)
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "file").touch()
    with pytest.raises(UserError, match="`overwrite`"):
        run(tiny_llama_dir, tmp_path / "full")
    assert [path.name for path in tmp_path.iterdir()] == ["full"]


def test_overwriting_replaces_the_old_checkpoint(tmp_path, tiny_llama_dir):
    (tmp_path / "graph").mkdir()
    (tmp_path / "graph" / "old").touch()
    run(tiny_llama_dir, tmp_path / "graph", overwrite=True, num_experts=8)
    assert load_graph(str(tmp_path / "graph")).config.num_experts == [8, 8]
    assert not (tmp_path / "graph" / "old").exists()


def test_one_expert_and_an_expert_per_neuron(tmp_path, tiny_llama_dir):
    dense = load_dense(str(tiny_llama_dir))
    for count in (1, 64):
        run(tiny_llama_dir, tmp_path / str(count), num_experts=count, plan={"experts_per_token": count})
        graph = load_graph(str(tmp_path / str(count)))
        assert logit_difference(graph, dense, random_ids(dense)) < 1e-4
