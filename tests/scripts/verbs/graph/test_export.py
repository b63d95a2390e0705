from __future__ import annotations

import pytest
from transformers import AutoModelForCausalLM

from models.checkpoints.load import load_dense, load_graph, load_tokenizer
from models.checkpoints.save import save_checkpoint
from models.files.fingerprint import fingerprint
from tests.support.command import assert_refused, run, tree
from tests.support.tiny_graphs import graph_of, logit_difference, random_ids, with_random_gains
from tests.support.tiny_moes import saved_moe

KEYS = {
    "out",
    "to",
    "exact",
    "mean_kl",
    "max_logit_difference",
    "argmax_agreement",
    "perplexity",
    "not_representable",
}
SMALL = ("--evaluation-tokens", "256")


@pytest.mark.parametrize("option", ["--out", "--output"])
def test_an_untouched_graph_leaves_exactly(tmp_path, capsys, tiny_graph_dir, tiny_llama_dir, option):
    out = tmp_path / "dense"
    outcome = run(capsys, "export", "--model", tiny_graph_dir, "--to", "dense", option, out, *SMALL, "--json")
    assert outcome.code == 0
    report = outcome.json()
    assert set(report) >= KEYS
    assert (report["out"], report["to"], report["exact"], report["not_representable"]) == (
        str(out),
        "dense",
        True,
        [],
    )
    assert 0 <= report["max_logit_difference"] < 1e-4 and report["mean_kl"] < 1e-9
    assert report["argmax_agreement"] == 1 and report["router_exponent"] is None
    assert fingerprint(load_dense(str(out))) == fingerprint(load_dense(str(tiny_llama_dir)))
    assert load_tokenizer(str(out)).bos_token_id == 0
    for name in ("tokenizer.json", "tokenizer_config.json"):
        assert (out / name).read_bytes() == (tiny_llama_dir / name).read_bytes()
    assert not list(out.glob("*.py")) and [path.name for path in tmp_path.iterdir()] == ["dense"]


def test_what_is_lost_is_named_and_measured(tmp_path, capsys, tiny_tokenizer):
    (tmp_path / "graph").mkdir()
    save_checkpoint(with_random_gains(graph_of()), tiny_tokenizer, tmp_path / "graph")
    command = ("export", "--model", tmp_path / "graph", "--out", tmp_path / "dense", *SMALL)
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
    assert run(capsys, "export", "--model", out, "--out", out, *SMALL, "--json").code == 2
    assert run(capsys, "export", "--model", out, "--out", out, "--overwrite", *SMALL, "--json").code == 0
    assert load_dense(str(out)).config.model_type == "llama"


def test_too_little_room_is_refused(tmp_path, capsys, tiny_graph_dir, little_room):
    outcome = run(capsys, "export", "--model", tiny_graph_dir, "--out", tmp_path / "dense")
    assert_refused(outcome, "MiB free on the file system of", as_json=False)
    assert list(tmp_path.iterdir()) == []


MIXTURES = {"mixtral": "mixtral", "qwen2-moe": "qwen2_moe", "granite-moe": "granitemoeshared"}


@pytest.mark.parametrize("to", MIXTURES)
def test_a_graph_leaves_as_a_mixture_that_transformers_opens(tmp_path, capsys, tiny_graph_dir, to):
    out = tmp_path / "moe"
    report = run(
        capsys, "export", "--model", tiny_graph_dir, "--to", to, "--out", out, *SMALL, "--json"
    ).json()
    assert set(report) >= KEYS and report["exact"] and report["not_representable"] == []
    assert report["mean_kl"] < 1e-2 and report["argmax_agreement"] > 0.95 and report["tokens"] > 200
    model = AutoModelForCausalLM.from_pretrained(out)
    assert model.config.model_type == MIXTURES[to] and model.config.num_experts_per_tok == 2
    graph = load_graph(str(tiny_graph_dir))
    assert logit_difference(graph, model, random_ids(graph)) < 5e-3
    assert load_tokenizer(str(out)).bos_token_id == 0 and not list(out.glob("*.py"))


def test_weights_of_another_type_are_written(tmp_path, capsys, tiny_graph_dir):
    out = tmp_path / "moe"
    command = ("export", "--model", tiny_graph_dir, "--to", "granite-moe", "--out", out, "--weights", "bf16")
    report = run(capsys, *command, *SMALL, "--json").json()
    assert report["mean_kl"] > 1e-6
    assert str(AutoModelForCausalLM.from_pretrained(out).dtype) == "torch.bfloat16"


def test_an_export_beyond_the_bound_writes_nothing(tmp_path, capsys, shared_graph_dir):
    command = ("export", "--model", shared_graph_dir, "--to", "qwen2-moe", "--out", tmp_path / "moe", *SMALL)
    outcome = run(capsys, *command, "--max-kl", "1e-9", "--json")
    assert outcome.code == 2 and "--max-kl" in outcome.json()["error"] and list(tmp_path.iterdir()) == []
    report = run(capsys, *command, "--max-kl", "50", "--json").json()
    assert report["not_representable"] == [
        "default outputs of experts that a token does not visit: layers 0, 1"
    ]
    assert report["perplexity"]["before"] != report["perplexity"]["after"]


def test_a_mixture_of_the_format_is_copied_and_another_refused(tmp_path, capsys, tiny_tokenizer):
    source = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    command = ("export", "--model", source, "--out", tmp_path / "copy", *SMALL)
    outcome = run(capsys, *command, "--to", "qwen2-moe", "--json")
    assert outcome.code == 2 and "'mixtral'" in outcome.json()["error"] and not (tmp_path / "copy").exists()
    report = run(capsys, *command, "--to", "mixtral", "--json").json()
    assert report["mean_kl"] == 0 and report["perplexity"]["before"] == report["perplexity"]["after"] > 1
    assert tree(tmp_path / "copy") == tree(source)


@pytest.mark.parametrize("to", ["dense", "mixtral"])
def test_every_export_has_a_card_and_settings_for_generation(tmp_path, capsys, tiny_graph_dir, to):
    out = tmp_path / "named"
    card = ("--base-model", "me/base", "--license", "mit", "--trained-on", "letters")
    command = ("export", "--model", tiny_graph_dir, "--to", to, "--out", out, *card, *SMALL, "--json")
    assert run(capsys, *command).code == 0
    text = (out / "README.md").read_text()
    for words in (
        "# named",
        "base_model: me/base",
        "license: mit",
        "- letters",
        "Held-out text: wikimix",
        to,
    ):
        assert words in text
    assert (out / "generation_config.json").is_file()
