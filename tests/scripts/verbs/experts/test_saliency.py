from __future__ import annotations

import numpy as np
import pytest

from configs.errors import UserError
from experts.saliency.measures import ARRAYS, load_saliency, save_saliency
from tests.support.command import assert_refused, run, tree
from tests.support.saliency_samples import random_saliency, saliency_of_scores
from tests.support.tiny_moes import saved_moe


@pytest.fixture
def place(tmp_path, monkeypatch):
    """A working directory with saliency files: two of one model, one of another."""
    for name, seed in (("a.npz", 1), ("b.npz", 2)):
        save_saliency(
            random_saliency([6, 4], seed, model_fingerprint="m", datasets=[name], tokens=10), tmp_path / name
        )
    save_saliency(random_saliency([6, 5]), tmp_path / "other.npz")
    (tmp_path / "text.npz").write_text("no archive")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_show_tells_best_worst_and_never_routed(place, capsys):
    save_saliency(saliency_of_scores([[2.0, 0.0, 5.0], [1.0, 3.0]], model="m"), place / "c.npz")
    shown = run(capsys, "saliency", "show", "c.npz", "--metric", "freq", "--top", 2, "--json").json()
    assert (shown["num_layers"], shown["num_experts"], shown["metric"]) == (2, 3, "freq")
    assert shown["provenance"] == {"model": "m"}
    first, second = shown["layers"]
    assert (first["best"], first["worst"], first["never_routed"]) == ([2, 0], [1, 0], [1])
    assert (second["experts"], second["best"], second["never_routed"]) == (2, [1, 0], [])
    outcome = run(capsys, "saliency", "show", "c.npz", "--metric", "freq")
    assert outcome.code == 0 and "2:5, 0:2, 1:0" in outcome.out and "never" in outcome.out


def test_show_takes_reap_where_nothing_is_said(place, capsys):
    shown = run(capsys, "saliency", "show", "a.npz", "--json").json()
    np.testing.assert_allclose(shown["layers"][0]["scores"], load_saliency("a.npz").scores("reap")[0])


def test_diff_tells_how_alike_two_files_are(place, capsys):
    same = run(capsys, "saliency", "diff", "a.npz", "a.npz", "--json").json()
    assert same["spearman"] == pytest.approx(1) and same["bottom_quarter_overlap"] == 1
    told = run(capsys, "saliency", "diff", "a.npz", "b.npz", "--metric", "ean", "--top", 1, "--json").json()
    assert [len(layer["largest_changes"]) for layer in told["layers"]] == [1, 1] and told["spearman"] < 1
    mean = np.mean([layer["spearman"] for layer in told["layers"]])
    assert told["spearman"] == pytest.approx(mean) and told["metric"] == "ean"
    outcome = run(capsys, "saliency", "diff", "a.npz", "b.npz")
    assert outcome.code == 0 and "Spearman" in outcome.out and "->" in outcome.out


def test_diff_of_experts_all_alike_is_undefined(place, capsys):
    save_saliency(saliency_of_scores([[1.0, 1.0]]), place / "c.npz")
    assert run(capsys, "saliency", "diff", "c.npz", "c.npz", "--json").json()["spearman"] is None
    assert "undefined" in run(capsys, "saliency", "diff", "c.npz", "c.npz").out


@pytest.mark.parametrize("option", ["--out", "--output"])
def test_merge_adds_up_files_of_one_model(place, capsys, option):
    merged = run(capsys, "saliency", "merge", "a.npz", "b.npz", option, "new/c.npz", "--json").json()
    assert (merged["out"], merged["files"], merged["tokens"]) == ("new/c.npz", ["a.npz", "b.npz"], 20)
    first, second, both = (load_saliency(path) for path in ("a.npz", "b.npz", "new/c.npz"))
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(both, name), getattr(first, name) + getattr(second, name))
    assert both.provenance["datasets"] == ["a.npz", "b.npz"]
    assert "sums of 2 files" in run(capsys, "saliency", "merge", "a.npz", "b.npz", "--out", "d.npz").out


def test_a_rank_merge_is_no_saliency_file(place, capsys):
    arguments = ("saliency", "merge", "a.npz", "b.npz", "--ranks", "--out", "c.npz")
    assert_refused(run(capsys, *arguments, "--json"), "--ranks", as_json=True)
    assert "experts select" in " ".join(run(capsys, "saliency", "merge", "--help").out.split())
    run(capsys, "experts", "select", "--saliency", "a.npz", "--saliency", "b.npz", "--action", "analyze",
        "--out", "list")  # fmt: skip
    assert_refused(
        run(capsys, "saliency", "show", "list/filtered_experts.csv"), "plain numbers", as_json=False
    )


def test_an_output_file_is_replaced_only_when_asked(place, capsys):
    merge = ("saliency", "merge", "a.npz", "b.npz", "--out", "other.npz", "--json")
    assert_refused(run(capsys, *merge), "other.npz", "--overwrite", as_json=True)
    assert run(capsys, *merge, "--overwrite").code == 0
    assert load_saliency("other.npz").experts_per_layer == [6, 4]


BAD = {
    "no file": (("show", "absent.npz"), ["absent.npz", "not there"]),
    "no archive": (("show", "text.npz"), ["text.npz", "plain numbers"]),
    "an unknown metric": (("show", "a.npz", "--metric", "loss"), ["weighted_freq", "'loss'"]),
    "no experts to list": (("show", "a.npz", "--top", "0"), ["--top"]),
    "files of other shapes": (("diff", "a.npz", "other.npz"), ["[6, 4]", "[6, 5]"]),
    "files of other models": (
        ("merge", "a.npz", "other.npz", "--out", "c"),
        ["one model", "experts per layer"],
    ),
    "one file": (("merge", "a.npz", "--out", "c"), ["at least two"]),
    "a file twice": (("merge", "a.npz", "./a.npz", "--out", "c"), ["two different"]),
    "no files": (("merge", "--out", "c"), ["FILES"]),
    "no output": (("merge", "a.npz", "b.npz"), ["--out"]),
    "a directory as output": (("merge", "a.npz", "b.npz", "--out", "."), ["directory"]),
    "a file above the output": (("merge", "a.npz", "b.npz", "--out", "a.npz/c"), ["a.npz"]),
    "an unknown command": (("shwo", "a.npz"), ["shwo"]),
}


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("case", BAD)
def test_bad_input_is_one_line_and_leaves_nothing(place, capsys, case, as_json):
    arguments, words = BAD[case]
    before = tree(place)
    outcome = run(capsys, "saliency", *arguments, *(["--json"] if as_json else []))
    assert_refused(outcome, *words, as_json=as_json)
    assert tree(place) == before


def test_the_commands_explain_themselves(capsys):
    alone = run(capsys, "saliency")
    assert alone.code == 0 and all(name in alone.out for name in ("show", "diff", "merge"))
    for name in ("show", "diff", "merge"):
        assert "--json" in run(capsys, "saliency", name, "--help").out


def test_collect_writes_what_one_pass_sees(tmp_path, tiny_tokenizer, capsys):
    source = saved_moe("olmoe", tmp_path, tiny_tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"a document of number {index}" for index in range(20)))
    arguments = ["--model", source, "--dataset", text, "--split", "all", "--block-size", 16]
    outcome = run(capsys, "saliency", "collect", *arguments, "--out", tmp_path / "s.npz", "--json")
    result, found = outcome.json(), load_saliency(tmp_path / "s.npz")
    assert result["out"] == str(tmp_path / "s.npz") and result["seconds"] > 0
    assert result["tokens"] == found.provenance["tokens"] == found.freq[0].sum() / 2
    assert found.provenance["router"] == "softmax, then top-k" and found.provenance["datasets"] == [str(text)]
    assert not list(tmp_path.glob("*.partial"))
    again = run(capsys, "saliency", "collect", *arguments, "--out", tmp_path / "s.npz")
    assert again.code == 2 and "--overwrite" in again.err
    assert run(capsys, "saliency", "show", tmp_path / "s.npz").code == 0


def test_a_collection_that_could_not_be_saved_is_not_lost(tmp_path, tiny_tokenizer, capsys, monkeypatch):
    monkeypatch.setattr("models.moe.saliency_collection.SAVE_SECONDS", -1)
    source = saved_moe("olmoe", tmp_path, tiny_tokenizer)
    text = tmp_path / "text.txt"
    text.write_text("\n\n".join(f"a document of number {index}" for index in range(20)))
    arguments = [
        "saliency",
        "collect",
        "--model",
        source,
        "--data",
        text,
        "--split",
        "all",
        "--block-size",
        16,
    ]

    def full(saliency, path):
        raise UserError(f"no space left for {path}")

    with monkeypatch.context() as disk:
        disk.setattr("experts.saliency.measures.save_saliency", full)
        failed = run(capsys, *arguments, "--out", tmp_path / "s.npz")
    assert failed.code == 2 and "no space left" in failed.err
    assert (tmp_path / "s.npz.partial").exists() and not (tmp_path / "s.npz").exists()
    assert run(capsys, *arguments, "--out", tmp_path / "s.npz").code == 0
    assert (tmp_path / "s.npz").exists() and not (tmp_path / "s.npz.partial").exists()


def test_collect_refuses_a_dense_model(tmp_path, tiny_llama_dir, capsys):
    arguments = ["--model", tiny_llama_dir, "--data", "wikimix", "--out", tmp_path / "s.npz"]
    assert_refused(
        run(capsys, "saliency", "collect", *arguments), "expected a mixture of experts of type", as_json=False
    )
    assert tree(tmp_path) == {}
