from __future__ import annotations

import pytest
from rich.console import Console

from models.checkpoints.load import load_graph
from scripts.verbs.graph.bootstrap import report_table
from tests.support.command import run, tree

QUICK = ("--calibration-tokens", "512", "--evaluation-tokens", "256")


@pytest.mark.parametrize("option", ["--out", "--output"])
def test_the_json_report_has_the_agreed_keys(tmp_path, capsys, tiny_llama_dir, option):
    out = tmp_path / "graph"
    outcome = run(
        capsys, "bootstrap", "--model", tiny_llama_dir, "--experts", 8, option, out, *QUICK, "--json"
    )
    assert outcome.code == 0
    report = outcome.json()
    assert {"out", "experts", "experts_per_token", "layers", "perplexity"} <= set(report)
    assert (report["out"], report["experts"], report["experts_per_token"]) == (str(out), 8, 4)
    assert len(report["layers"]) == 2 and set(report["perplexity"]) == {"dense", "75", "50", "25"}
    for layer in report["layers"]:
        assert {"sizes", "inertia", "seconds"} <= set(layer) and layer["sizes"] == [8] * 8
    for share in ("75", "50", "25"):
        assert set(report["perplexity"][share]) == {"router", "centroid", "static", "oracle", "random"}
    assert "clustering layers" in outcome.err and (out / "cluster_stats.txt").is_file()


def test_a_reader_gets_a_table_and_the_next_step(tmp_path, capsys, tiny_llama_dir):
    out = tmp_path / "graph"
    outcome = run(
        capsys,
        "bootstrap",
        *(
            "--model",
            tiny_llama_dir,
            "--experts",
            4,
            "--out",
            out,
            "--features",
            "joint",
            "--router",
            "centroid",
        ),
        *("--experts-per-token", 3, "--clustering", "k-means-constrained", "--seed", 7, *QUICK),
    )
    assert outcome.code == 0 and "oracle" in outcome.out and f"wrote {out}" in outcome.out.replace("\n", "")
    assert "fedgraft simulate --graph" in outcome.err and "next" not in outcome.out
    graph = load_graph(str(out))
    assert graph.config.experts_per_token == 3 and graph.config.num_experts == [4, 4]


def test_calibration_text_of_several_sources_is_used(tmp_path, capsys, tiny_llama_dir):
    for name, text in (("a", "one dog and one cat. "), ("b", "3 + 4 = 7; ")):
        (tmp_path / f"{name}.txt").write_text("\f".join([text * 20] * 12))
    figures = []
    for sources in (["a.txt"], ["a.txt", "b.txt"]):
        options = [word for name in sources for word in ("--calibration", tmp_path / name)]
        outcome = run(
            capsys,
            "bootstrap",
            *("--model", tiny_llama_dir, "--experts", 4, "--out", tmp_path / str(len(figures))),
            *(*options, *QUICK, "--json"),
        )
        assert outcome.code == 0, outcome.err
        figures.append(outcome.json()["perplexity"]["dense"])
    assert figures[0] != figures[1]


def test_overwrite_replaces_and_nothing_else_is_touched(tmp_path, capsys, tiny_llama_dir):
    out, other = tmp_path / "graph", tmp_path / "other"
    out.mkdir()
    (out / "old").touch()
    other.write_text("other")
    command = ("bootstrap", "--model", tiny_llama_dir, "--experts", 4, "--out", out, *QUICK, "--json")
    assert run(capsys, *command).code == 2
    assert run(capsys, *command, "--overwrite").code == 0
    assert not (out / "old").exists() and (out / "model.safetensors").is_file()
    assert {path.name for path in tmp_path.iterdir()} == {"graph", "other"} and "other" in tree(tmp_path)


def test_an_unknown_clustering_is_refused(tmp_path, capsys, tiny_llama_dir):
    command = ("bootstrap", "--model", tiny_llama_dir, "--experts", 4, "--out", tmp_path / "new", "--json")
    outcome = run(capsys, *command, "--clustering", "k-means")
    assert outcome.code == 2 and "flow" in outcome.json()["error"] and not (tmp_path / "new").exists()


def test_the_table_shows_every_figure():
    shares = {
        str(share): {
            name: share + place
            for place, name in enumerate(("router", "centroid", "static", "oracle", "random"))
        }
        for share in (75, 50, 25)
    }
    console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(report_table({"dense": 61.94, **shares}))
    text = console.export_text()
    assert "61.94" in text
    for share in (75, 50, 25):
        assert f"{share} %" in text and all(f"{share + place:.2f}" in text for place in range(5))
