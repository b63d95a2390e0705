"""Seconds of an exchange with SuperNodes on loopback, by ``server.rounds.exchange`` and by Flower.

A real SuperLink and two SuperNodes; each message of 1 MiB starts a process at its node, whose ClientApp sends it back
and imports Flower alone. The two ways take turns in one run. ``send_and_receive`` asks for replies every 3 s; the
project's exchange asks 20 times a second, checks every reply and counts its bytes. Nodes look for messages 20 times a
second.
"""

from __future__ import annotations

import json
import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.exchange.apps.server_app import SECONDS_FILE
from benchmarks.support.flower.deployment import deployment
from benchmarks.support.flower.project import project_with_apps
from benchmarks.support.runner import Measured, OnStep, run_benchmark
from configs.schema import RunConfig
from server.flower.deployed_run import follow_run, submit_run
from server.flower.flower_process import loopback

_APPS = "benchmarks.exchange.apps"
_FILES = ("/benchmarks/exchange/__init__.py", "/benchmarks/exchange/apps/*.py")
_EXCHANGES = {"full": 10, "quick": 1}


def measure(quick: bool, on_step: OnStep) -> Measured:
    """Measure the median seconds of an exchange in both ways.

    Args:
        quick: exchange once in each way.
        on_step: called with the stage, the number of steps done and their total.
    """
    on_step("deployment", 0, 1)
    with TemporaryDirectory(prefix="fedgraft-") as scratch:
        seconds = _seconds(Path(scratch), _EXCHANGES["quick" if quick else "full"])
    on_step("deployment", 1, 1)
    own, flower = (statistics.median(seconds[name]) for name in ("own", "flower"))
    return Measured(
        figures={"seconds_own": own, "seconds_flower": flower, "ratio": own / flower},
        peers={"seconds": seconds},
        notes={"ratio": f"medians of {len(seconds['own'])} exchanges in turn"},
    )


def _seconds(scratch: Path, exchanges: int) -> dict[str, list[float]]:
    """Seconds of each exchange by way."""
    logs = scratch / "logs"
    config = RunConfig(log_dir=str(logs), num_clients=2, num_rounds=exchanges)
    with (
        project_with_apps(f"{_APPS}.server_app:app", f"{_APPS}.client_app:app", _FILES) as project,
        deployment(scratch / "flower") as started,
    ):
        follow_run(submit_run(project, config, connection=loopback(started.port)), logs)
    return json.loads((logs / SECONDS_FILE).read_text(encoding="utf-8"))


if __name__ == "__main__":
    run_benchmark("exchange", measure)
