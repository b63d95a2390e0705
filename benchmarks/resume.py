"""Runs that are killed with SIGKILL at each stage of a round and continued: model, time and size of the saved state.

Two clients train a graph for three rounds in the ServerApp and ClientApp over an in-process Flower grid, graph edits
included. Each killed run is continued by another process; ``stages_bit_identical`` counts those that end with the
weights of the undisturbed run. ``seconds_to_resume`` is the time to the first request, loading of the model included,
with that of a new run in ``seconds_to_start``. ``checkpoint_bytes_over_model`` are the newest state and all steps of
the undisturbed run over the fp32 weights of the graph.
"""

from __future__ import annotations

import json
import signal
import statistics
import subprocess
import sys
from collections.abc import Mapping
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.support.material import data_sources, model_path, write_bootstrapped
from benchmarks.support.resume.killed_run import NONE, STAGES
from benchmarks.support.runner import ROOT, Measured, OnStep, run_benchmark
from models.checkpoints.load import load_graph

_QUICK_STAGES = ("after training",)


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Kill and continue a run at each stage.

    Args:
        quick: use the embedded model and one stage.
        on_step: called with the stage, the number of steps done and their total.
    """
    stages = _QUICK_STAGES if quick else tuple(STAGES)
    with TemporaryDirectory(prefix="fedgraft-") as scratch:
        folder = Path(scratch)
        settings = _settings(folder, quick)
        undisturbed, found = _finished(settings, folder / "undisturbed"), {}
        for stage in stages:
            found[stage] = _continued(settings, folder / stage.replace(" ", "-"), stage)
            on_step("stages", len(found), len(stages))
        size = _state_bytes(folder / "undisturbed" / "logs" / "state")
        weights = 4 * load_graph(str(folder / "graph")).num_parameters()
    same = [each["hash"] == undisturbed["hash"] for each in found.values()]
    return Measured(
        figures={
            "stages_bit_identical": sum(same),
            "stages": len(same),
            "seconds_to_resume": statistics.median(each["seconds_to_resume"] for each in found.values()),
            "seconds_to_start": undisturbed["seconds_to_resume"],
            "checkpoint_bytes_over_model": size / weights,
        },
        peers={"undisturbed": undisturbed, "stages": found, "setting": settings},
    )


def _settings(folder: Path, quick: bool) -> dict[str, Any]:
    """Run configuration, hyphenated; the graph is written to ``folder``."""
    model = model_path("mix7M", quick=quick)
    write_bootstrapped(folder / "graph", model, 4 if quick else 16, 256 if quick else 2048)
    return {
        "graph": str(folder / "graph"),
        "data": ";".join(data_sources(("recipes", "law_dc"), quick=quick)),
        "num-clients": 2,
        "num-rounds": 3,
        "local-steps": 1 if quick else 4,
        "batch-size": 2,
        "block-size": 64,
        "eval-blocks": 2,
        "expert-budget": 2 if quick else 12,
        "train-documents": 40,
        "precision": "fp32",
    }


def _continued(settings: Mapping[str, Any], folder: Path, stage: str) -> dict[str, Any]:
    """Result of a run that was killed at ``stage`` and continued."""
    code = _process(_config(settings, folder), stage).returncode
    if code != -signal.SIGKILL:
        raise RuntimeError(f"expected a run killed {stage}, got exit code {code}")
    return _finished({**settings, "resume": True}, folder)


def _finished(settings: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    done = _process(_config(settings, folder), NONE)
    if done.returncode:
        raise RuntimeError(f"the run in {folder} failed: {done.stderr.strip().splitlines()[-1:]}")
    return json.loads(done.stdout.splitlines()[-1])


def _config(settings: Mapping[str, Any], folder: Path) -> Path:
    """Configuration file of a run whose logs and model go to ``folder``."""
    folder.mkdir(exist_ok=True)
    path = folder / "config.json"
    own = {"log-dir": str(folder / "logs"), "out": str(folder / "out")}
    path.write_text(json.dumps({**settings, **own}), encoding="utf-8")
    return path


def _process(config: Path, stage: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-m", "benchmarks.support.resume.killed_run", str(config), stage]
    return subprocess.run(command, cwd=ROOT, capture_output=True, text=True)


def _state_bytes(folder: Path) -> int:
    """Bytes of the newest state and of all steps."""
    rounds = sorted(folder.glob("round-*.safetensors"), key=lambda path: path.stat().st_mtime)
    return sum(path.stat().st_size for path in [*folder.glob("step-*.safetensors"), rounds[-1]])


if __name__ == "__main__":
    run_benchmark("resume", measure)
