from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import click
import pytest
from safetensors.torch import load_file, save_file
from transformers import GPT2Config

import fedgraft
from configs.errors import Interrupted, UserError
from tests.conftest import tiny_llama
from tests.support.command import assert_refused, run, tree
from tests.support.documents import write_documents
from tests.support.tiny_gguf import write_gguf

VERBS = ("bootstrap", "evaluate", "generate", "export")
ROOT = Path(fedgraft.__file__).parent


@pytest.fixture
def place(tmp_path, monkeypatch, tiny_llama_dir, tiny_graph_dir) -> Path:
    """A working directory with a dense model, a graph and texts in it."""
    shutil.copytree(tiny_llama_dir, tmp_path / "dense")
    shutil.copytree(tiny_graph_dir, tmp_path / "graph")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "precious.txt").write_text("precious")
    write_documents(tmp_path / "text.jsonl", [f"a dog and {count} cats." for count in range(40)])
    (tmp_path / "empty.txt").write_text(" \n")
    monkeypatch.chdir(tmp_path)
    return tmp_path


def spoil(name: str) -> None:
    """Make the directory ``spoiled``: the dense model with one thing wrong."""
    shutil.copytree("dense", "spoiled")
    weights = Path("spoiled/model.safetensors")
    if name == "truncated":
        weights.write_bytes(weights.read_bytes()[:-100])
    elif name == "missing":
        weights.unlink()
    elif name == "tensor missing":
        tensors = load_file(weights)
        del tensors["model.layers.0.mlp.down_proj.weight"]
        save_file(tensors, weights, metadata={"format": "pt"})
    elif name == "another shape":
        Path("spoiled/config.json").write_text(
            Path("spoiled/config.json")
            .read_text()
            .replace('"intermediate_size": 64', '"intermediate_size": 32')
        )
    elif name == "gpt2":
        GPT2Config().save_pretrained("spoiled")


BOOTSTRAP = ("bootstrap", "--model", "dense", "--experts", "4", "--out", "new")
EVALUATE = ("evaluate", "--model", "graph", "--data", "text.jsonl")
BAD_INPUT = {
    "E that does not divide": ((*BOOTSTRAP, "--experts", "5"), ["64", "got 5", "4", "8"]),
    "E of zero": ((*BOOTSTRAP, "--experts", "0"), ["64", "got 0", "1, 2"]),
    "k beyond E": ((*BOOTSTRAP, "--experts-per-token", "5"), ["4 experts", "got 5"]),
    "k of zero": ((*BOOTSTRAP, "--experts-per-token", "0"), ["got 0"]),
    "unknown features": ((*BOOTSTRAP, "--features", "gats"), ["gate+up", "'gats'"]),
    "unknown router": ((*BOOTSTRAP, "--router", "oracle"), ["ridge", "'oracle'"]),
    "a full output directory": ((*BOOTSTRAP, "--out", "full"), ["full", "--overwrite"]),
    "a file as output directory": ((*BOOTSTRAP, "--out", "text.jsonl"), ["text.jsonl", "directory"]),
    "a file above the output directory": (
        (*BOOTSTRAP, "--out", "text.jsonl/new"),
        ["text.jsonl", "directory"],
    ),
    "no model there": ((*BOOTSTRAP, "--model", "absent"), ["absent", "config.json"]),
    "a graph as dense model": ((*BOOTSTRAP, "--model", "graph"), ["llama", "'fedgraft'"]),
    "calibration text that is not there": ((*BOOTSTRAP, "--calibration", "absent.txt"), ["absent.txt"]),
    "empty calibration text": ((*BOOTSTRAP, "--calibration", "empty.txt"), ["empty.txt"]),
    "too few calibration tokens": ((*BOOTSTRAP, "--calibration-tokens", "1"), ["--calibration-tokens"]),
    "no integer": ((*BOOTSTRAP, "--experts", "four"), ["--experts", "four"]),
    "a missing option": (("bootstrap", "--model", "dense", "--experts", "4"), ["--out"]),
    "an unknown option": ((*BOOTSTRAP, "--expert", "4"), ["--expert"]),
    "an option without its value": (("bootstrap", "--model"), []),
    "an unknown verb": (("bootsrap",), ["bootsrap"]),
    "a word too many": ((*BOOTSTRAP, "more"), ["more"]),
    "evaluate: no data there": ((*EVALUATE[:3], "--data", "absent.jsonl"), ["absent.jsonl"]),
    "evaluate: empty data": ((*EVALUATE[:3], "--data", "empty.txt"), ["empty.txt"]),
    "evaluate: an unknown domain": ((*EVALUATE[:3], "--data", "wikimix:prise"), ["prise"]),
    "evaluate: no data named": (EVALUATE[:3], ["--data"]),
    "evaluate: k beyond E": ((*EVALUATE, "--experts-per-token", "5"), ["between 1 and 4", "got 5"]),
    "evaluate: k of a dense model": (
        ("evaluate", "--model", "dense", "--data", "text.jsonl", "--experts-per-token", "2"),
        ["dense model"],
    ),
    "evaluate: an unknown split": ((*EVALUATE, "--split", "tests"), ["valid", "'tests'"]),
    "evaluate: blocks beyond the context": ((*EVALUATE, "--block-size", "129"), ["128", "129"]),
    "evaluate: no model there": (("evaluate", "--model", "absent", "--data", "text.jsonl"), ["absent"]),
    "generate: no model there": (("generate", "--model", "absent", "--prompt", "a"), ["absent"]),
    "generate: a prompt beyond the context": (
        ("generate", "--model", "graph", "--prompt", "a" * 200),
        ["127", "got 201"],
    ),
    "generate: a negative temperature": (
        ("generate", "--model", "graph", "--prompt", "a", "--temperature", "-1"),
        ["--temperature"],
    ),
    "export: a dense model": (
        ("export", "--model", "dense", "--out", "new"),
        ["'llama'", "fedgraft bootstrap"],
    ),
    "export: an unknown format": (
        ("export", "--model", "graph", "--to", "onnx", "--out", "new"),
        ["dense", "'onnx'"],
    ),
    "export: a full output directory": (
        ("export", "--model", "graph", "--out", "full"),
        ["full", "--overwrite"],
    ),
}
SPOILED = {
    "truncated": ["safetensors"],
    "missing": ["safetensors"],
    "tensor missing": ["model.layers.0.mlp.down_proj.weight"],
    "another shape": ["mlp"],
    "gpt2": ["'gpt2'", "llama"],
}


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize("case", BAD_INPUT)
def test_bad_input_is_one_line_and_exit_code_2_and_leaves_nothing(place, capsys, case, as_json):
    arguments, words = BAD_INPUT[case]
    before = tree(place)
    outcome = run(capsys, *arguments, *(["--json"] if as_json else []))
    assert_refused(outcome, *words, as_json=as_json)
    assert tree(place) == before


@pytest.mark.parametrize("damage", SPOILED)
@pytest.mark.parametrize(
    "command",
    [
        ("bootstrap", "--model", "spoiled", "--experts", "4", "--out", "new"),
        ("evaluate", "--model", "spoiled", "--data", "text.jsonl"),
        ("generate", "--model", "spoiled", "--prompt", "a"),
    ],
    ids=lambda command: command[0],
)
def test_a_damaged_checkpoint_is_one_line_and_leaves_nothing(place, capsys, damage, command):
    if damage == "gpt2" and command[0] != "bootstrap":
        damage = "truncated"
    spoil(damage)
    before = tree(place)
    assert_refused(run(capsys, *command, "--json"), *SPOILED[damage], as_json=True)
    assert tree(place) == before


@pytest.mark.parametrize("as_json", [True, False])
@pytest.mark.parametrize(
    "error, code, words",
    [
        (RuntimeError("first\nsecond"), 1, "RuntimeError: first second"),
        (UserError("expected a,\n got b"), 2, "expected a, got b"),
        (UserError("expected `min_rank`"), 2, "expected --min-rank"),
        (KeyboardInterrupt(), 130, "interrupted"),
        (Interrupted("interrupted; it is in out"), 130, "interrupted; it is in out"),
        (click.Abort(), 130, "interrupted"),
        (MemoryError(), 1, "MemoryError"),
    ],
)
def test_every_failure_leaves_as_one_line_with_its_exit_code(
    monkeypatch, capsys, error, code, words, as_json
):
    def failing(**options):
        raise error

    monkeypatch.setattr(fedgraft, "app", failing)
    outcome = run(capsys, "anything", *(["--json"] if as_json else []))
    assert outcome.code == code and outcome.err.startswith(f"fedgraft: error: {words}")
    assert len(outcome.err.splitlines()) == 1
    assert (outcome.json() if as_json else outcome.out) == (
        {"error": outcome.err.strip().removeprefix("fedgraft: error: ")} if as_json else ""
    )


def test_every_verb_explains_itself(capsys):
    top = run(capsys, "--help")
    assert top.code == 0 and top.err == ""
    for name in VERBS:
        assert name in top.out
        outcome = run(capsys, name, "--help")
        assert outcome.code == 0 and "--json" in outcome.out and "Usage" in outcome.out


@pytest.mark.parametrize("name", fedgraft.VERBS)
def test_a_line_of_the_verb_table_is_the_first_sentence_of_the_verbs_help(name):
    verb = fedgraft.VERBS[name]
    text = verb.load(name).help or ""
    assert re.split(r"(?<=\.)\s", " ".join(text.split()))[0] == verb.summary


def test_the_help_lists_every_verb_under_its_panel(capsys):
    lines = run(capsys, "--help").out.splitlines()
    panels = [verb.panel for verb in fedgraft.VERBS.values()]
    rows = {name: i for i, line in enumerate(lines) for name in fedgraft.VERBS if f" {name} " in line[:20]}
    heads = {panel: i for i, line in enumerate(lines) for panel in panels if f"─ {panel} ─" in line}
    assert set(rows) == set(fedgraft.VERBS) and set(heads) == set(panels)
    for name, verb in fedgraft.VERBS.items():
        assert max(head for head in heads.values() if head < rows[name]) == heads[verb.panel]


def test_the_help_imports_no_verb():
    code = (
        "import sys, fedgraft; fedgraft.main(['--help']);"
        "sys.exit(', '.join(name for name in sys.modules if name.startswith('scripts.verbs')) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_without_arguments_the_help_is_shown(capsys):
    outcome = run(capsys)
    assert outcome.code == 0 and all(name in outcome.out for name in VERBS)


def test_the_arguments_of_the_process_are_taken(monkeypatch, capsys):
    monkeypatch.setattr(sys, "argv", ["fedgraft", "nonsense"])
    assert fedgraft.main() == 2 and "nonsense" in capsys.readouterr().err


def test_the_module_runs_as_a_program_from_anywhere(tmp_path):
    environment = {**os.environ, "TERM": "dumb", "COLUMNS": "100"}
    done = subprocess.run(
        [sys.executable, str(ROOT / "fedgraft.py"), "--help"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert done.returncode == 0 and all(name in done.stdout for name in VERBS)
    wrong = subprocess.run(
        [sys.executable, str(ROOT / "fedgraft.py"), "nonsense"],
        cwd=tmp_path,
        env=environment,
        capture_output=True,
        text=True,
        timeout=60,
    )
    assert wrong.returncode == 2 and "nonsense" in wrong.stderr


def test_help_needs_no_heavy_library():
    code = (
        "import sys, fedgraft; fedgraft.main(['bootstrap', '--help']);"
        "sys.exit(', '.join({'torch', 'transformers', 'datasets', 'flwr'} & set(sys.modules)) or 0)"
    )
    done = subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, timeout=60)
    assert done.returncode == 0, done.stderr


def test_a_gguf_file_is_a_model(place, capsys):
    write_gguf(tiny_llama(), place / "tiny.gguf")
    outcome = run(
        capsys,
        "evaluate",
        "--model",
        "tiny.gguf",
        "--data",
        "text.jsonl",
        "--split",
        "all",
        "--block-size",
        16,
        "--json",
    )
    assert outcome.code == 0 and outcome.json()["perplexity"] > 1
    assert run(capsys, "generate", "--model", "tiny.gguf", "--prompt", "!", "--max-new-tokens", 2).code == 0
    command = ("bootstrap", "--model", "tiny.gguf", "--experts", 4, "--out", "of-gguf", "--json")
    report = run(capsys, *command, "--calibration-tokens", 512, "--evaluation-tokens", 256).json()
    assert report["experts"] == 4 and (place / "of-gguf" / "config.json").is_file()
