"""The quick start: stages run once, are kept, and are done again when what they depend on changes."""

from __future__ import annotations

import json
import subprocess
from pathlib import Path
from types import SimpleNamespace

import pytest

from configs.schema import load_run_config
from configs.values import read_config_file
from scripts import quickstart
from scripts.quickstart import CONFIG, EXPERTS, QuickStart, lines, run
from tests.support.paths import ROOT

SHARES = {"router": 9.0, "centroid": 9.5, "static": 12.0, "oracle": 8.0, "random": 11.0}
RESULTS = {
    "bootstrap": {"out": "g", "perplexity": {"dense": 7.0, "75": SHARES, "50": SHARES, "25": SHARES}},
    "simulate": {
        "rounds": 1,
        "stopped": None,
        "clients": [
            {
                "name": "recipes",
                "budget": 16,
                "perplexity_before": 50.0,
                "perplexity_after": 20.0,
                "perplexity_after_personal": None,
                "graph_hash": "ab" * 32,
                "refused": None,
            }
        ],
        "bytes_up": 1000,
        "bytes_down": 2000,
        "bytes_up_dense": 100_000,
        "bytes_down_dense": 100_000,
        "edits": 4,
        "graph_hash": "ab" * 32,
        "out": "model",
        "log_dir": "run",
    },
    "export": {
        "out": "d",
        "to": "dense",
        "exact": False,
        "max_logit_difference": 0.5,
        "not_representable": ["x: 0"],
    },
    "generate": {"prompt": "# ", "text": "[bold] soup"},
}


@pytest.fixture
def commands(monkeypatch):
    """Commands that stages run, answered from RESULTS; output folders appear as the real ones would."""
    seen: list[list[str]] = []

    def answer(command, **_):
        arguments = command[2:]
        seen.append(arguments)
        if "--out" in arguments:
            Path(arguments[arguments.index("--out") + 1]).mkdir(parents=True, exist_ok=True)
        return SimpleNamespace(returncode=0, stdout=json.dumps(RESULTS[arguments[0]]))

    monkeypatch.setattr(quickstart.subprocess, "run", answer)
    return seen


@pytest.fixture
def quick(tmp_path, monkeypatch):
    monkeypatch.setattr(quickstart, "_digest", lambda paths: "inputs")
    return QuickStart(tmp_path / "quickstart", tmp_path / "cache" / "graph")


def test_every_stage_runs_once_and_a_second_run_keeps_all(quick, commands):
    first = run(quick)
    assert [arguments[0] for arguments in commands] == [
        "bootstrap",
        "simulate",
        "export",
        "generate",
        "generate",
    ]
    assert all(arguments[-1] == "--json" for arguments in commands)
    assert run(quick) == first
    assert len(commands) == 5


def test_a_stage_runs_again_when_its_output_is_gone_or_its_inputs_changed(quick, commands):
    run(quick)
    (quick.folder / "dense").rmdir()
    run(quick)
    assert [arguments[0] for arguments in commands[5:]] == ["export"]
    quick.inputs = "other inputs"
    run(quick)
    assert len(commands) == 6 + 5


def test_a_failing_stage_ends_the_quick_start_with_its_status(quick, monkeypatch):
    monkeypatch.setattr(
        quickstart.subprocess, "run", lambda *_, **__: SimpleNamespace(returncode=2, stdout="")
    )
    with pytest.raises(SystemExit) as ended:
        run(quick)
    assert ended.value.code == 2
    assert not (quick.folder / "bootstrap.json").exists()


def test_the_summary_names_what_the_issue_asks_for(quick, commands):
    from rich.console import Console

    console = Console(record=True, width=200)
    for line in lines(run(quick), quick):
        console.print(line)
    text = console.export_text()
    for wanted in (
        "k-means experts 9.00",
        "random experts 11.00",
        "50.00",
        "20.00",
        "100 times less",
        "graph edits: 4",
    ):
        assert wanted in text
    assert "[bold] soup" in text  # text of the model is not markup
    assert "tensorboard --logdir" in text and "bash scripts/test.sh" in text


def test_its_configuration_is_valid_and_its_experts_divide_the_demo_model():
    config = load_run_config(read_config_file(ROOT / CONFIG))
    assert config.num_clients == 2 and len(config.sources) == 2
    shape = json.loads((ROOT / "configs/llama_demo.json").read_text())
    assert shape["intermediate_size"] % EXPERTS == 0


@pytest.mark.parametrize("script", sorted((ROOT / "scripts").rglob("*.sh")), ids=lambda path: path.name)
def test_shell_scripts_parse(script):
    subprocess.run(["bash", "-n", str(script)], check=True)
