"""``fedgraft bootstrap`` and ``fedgraft heal`` of its graph on the same text, as a user runs them."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.support.bootstrap.layerwise import FULL, MIXES, QUICK
from benchmarks.support.material import REAL_MODEL, data_sources, model_path
from benchmarks.support.runner import measured_apart
from models.checkpoints.load import load_dense

# Tuned on the mix "questions and law" for ten minutes of one core.
HEALING = {"--steps": 46, "--batch-size": 2, "--learning-rate": 3e-4}
QUICK_HEALING = {"--steps": 2, "--batch-size": 2, "--block-size": 64}


@dataclass(frozen=True)
class Measured:
    """Results of the two commands.

    Attributes:
        weights: bytes of the weights of the dense model in fp32.
        bootstrap: ``{"seconds", "peak_bytes", "result"}``, with the short report.
        heal: the same of ``fedgraft heal``.
    """

    weights: int
    bootstrap: Mapping[str, Any]
    heal: Mapping[str, Any]

    def figures(self) -> dict[str, float]:
        """Seconds and memory of the bootstrap, and held-out perplexity after healing relative to the dense model."""
        perplexity = self.heal["result"]["perplexity"]
        return {
            "seconds_bootstrap": self.bootstrap["seconds"],
            "rss_over_weights": self.bootstrap["peak_bytes"] / self.weights,
            "healed_50_over_dense": perplexity["after"] / perplexity["dense"],
            "core_minutes_healing": self.heal["result"]["core_seconds"] / 60,
        }


def measure_commands(quick: bool) -> Measured:
    """Run both commands on the mix of all domains, each in a process of its own.

    Args:
        quick: use the embedded model and little text.
    """
    name = "mix7M" if quick else REAL_MODEL
    model, amounts = model_path(name, quick=quick), (QUICK if quick else FULL)[name]
    sources = [str(source) for source in data_sources(MIXES["all"], quick=quick)]
    held_out = {"--evaluation-tokens": amounts.held_out_blocks * amounts.block_size}
    options = {
        "--model": model,
        "--experts": amounts.options.num_experts,
        "--calibration-tokens": amounts.calibration_blocks * amounts.block_size,
        "--report": "short",
        **held_out,
    }
    with TemporaryDirectory(prefix="fedgraft-") as folder:
        graph, healed = Path(folder) / "graph", Path(folder) / "healed"
        bootstrap = _command("bootstrap", {**options, "--out": graph}, "--calibration", sources)
        healing = QUICK_HEALING if quick else HEALING
        options = {"--model": graph, "--base": model, **healing, **held_out, "--out": healed}
        heal = _command("heal", options, "--data", sources)
    return Measured(4 * load_dense(model).num_parameters(), bootstrap, heal)


def _command(verb: str, options: Mapping[str, Any], repeated: str, sources: list[str]) -> dict[str, Any]:
    pairs = [*options.items(), *((repeated, source) for source in sources)]
    return measured_apart("bootstrap.process", [verb, *(str(word) for pair in pairs for word in pair)])
