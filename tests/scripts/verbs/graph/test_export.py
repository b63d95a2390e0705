from __future__ import annotations

import pytest

from models.checkpoints.load import load_dense, load_graph, load_tokenizer
from models.checkpoints.save import save_checkpoint
from models.files.fingerprint import fingerprint
from tests.support.command import assert_refused, run
from tests.support.tiny_graphs import graph_of, with_random_gains

KEYS = {"out", "to", "exact", "max_logit_difference", "not_representable"}


@pytest.mark.parametrize("option", ["--out", "--output"])
def test_an_untouched_graph_leaves_exactly(tmp_path, capsys, tiny_graph_dir, tiny_llama_dir, option):
    out = tmp_path / "dense"
    outcome = run(capsys, "export", "--model", tiny_graph_dir, "--to", "dense", option, out, "--json")
    assert outcome.code == 0
    report = outcome.json()
    assert set(report) >= KEYS
    assert (report["out"], report["to"], report["exact"], report["not_representable"]) == (
        str(out),
        "dense",
        True,
        [],
    )
    assert 0 <= report["max_logit_difference"] < 1e-4
    assert fingerprint(load_dense(str(out))) == fingerprint(load_dense(str(tiny_llama_dir)))
    assert load_tokenizer(str(out)).bos_token_id == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tiny_llama_dir / name).read_bytes()
    assert not list(out.glob("*.py")) and [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_what_is_lost_is_named_and_measured(tmp_path, capsys, tiny_tokenizer):
    (tmp_path / "graph").mkdir()
    save_checkpoint(with_random_gains(graph_of()), tiny_tokenizer, tmp_path / "graph")
    command = ("export", "--model", tmp_path / "graph", "--out", tmp_path / "dense")
    report = run(capsys, *command, "--json").json()
    assert report["exact"] is False and report["max_logit_difference"] > 1e-3
    assert len(report["not_representable"]) == 2
    outcome = run(capsys, *command, "--overwrite")
    assert outcome.code == 0 and "approximate" in outcome.out
    assert outcome.out.count("not representable") == 2 and "logit difference" in outcome.out


def test_a_graph_may_be_overwritten_by_its_own_export(tmp_path, capsys, tiny_tokenizer):
    (tmp_path / "graph").mkdir()
    save_checkpoint(graph_of(), tiny_tokenizer, tmp_path / "graph")
    out = tmp_path / "graph"
    assert load_graph(str(out))
    assert run(capsys, "export", "--model", out, "--out", out, "--json").code == 2
    assert run(capsys, "export", "--model", out, "--out", out, "--overwrite", "--json").code == 0
    assert load_dense(str(out)).config.model_type == "llama"


def test_too_little_room_is_refused(tmp_path, capsys, tiny_graph_dir, little_room):
    outcome = run(capsys, "export", "--model", tiny_graph_dir, "--out", tmp_path / "dense")
    assert_refused(outcome, "MiB free on the file system of", as_json=False)
    assert list(tmp_path.iterdir()) == []
