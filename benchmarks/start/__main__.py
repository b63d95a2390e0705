"""Seconds from a message to the first training step of a client with a really pretrained Llama.

A real SuperLink and one SuperNode on loopback; the graph is that of ``benchmarks.real_llama``, 7,680 experts of
SmolLM2-135M. Each message starts a process, which imports the libraries, opens the graph with its experts on disk,
applies the server's step, evaluates the received model on one block, and reads the experts that it trains. Seconds are
counted from the start of the process; a node looks for messages 20 times a second. The first round is left out: it
packs the client's text, which later rounds read from disk.
"""

from __future__ import annotations

import statistics
from pathlib import Path
from tempfile import TemporaryDirectory

from benchmarks.real_llama import FULL, QUICK
from benchmarks.support.flower.deployment import Node, deployment
from benchmarks.support.material import data_sources
from benchmarks.support.quality.runs import bootstrapped_graph
from benchmarks.support.quality.settings import Settings
from benchmarks.support.runner import ROOT, Measured, OnStep, run_resumable
from benchmarks.support.stored import work_folder
from configs.schema import RunConfig
from server.flower.deployed_run import follow_run, submit_run
from server.flower.flower_process import loopback
from server.reporting.run_log import read_rounds

_ROUNDS = {"full": 6, "quick": 2}


def measure(quick: bool, on_step: OnStep, *, work: Path | None = None) -> Measured:
    """Measure the median seconds to the first training step, from the second round on.

    Args:
        quick: use the embedded model and two rounds.
        on_step: called with the stage, the number of steps done and their total.
        work: folder of the graph; None: a temporary one.
    """
    settings = QUICK if quick else FULL
    with work_folder(work) as folder, TemporaryDirectory(prefix="fedgraft-") as scratch:
        graph = bootstrapped_graph(0, settings, quick, folder)
        on_step("graph", 1, 2)
        seconds = start_seconds(graph, settings, Path(scratch), quick)
        on_step("deployment", 2, 2)
    return Measured(
        figures={"seconds_message_to_first_step": statistics.median(seconds[1:])},
        peers={"seconds_by_round": seconds, "setting": vars(settings)},
        notes={"seconds_message_to_first_step": f"median of {len(seconds) - 1} rounds after the first"},
    )


def start_seconds(graph: Path, settings: Settings, scratch: Path, quick: bool) -> list[float]:
    """Seconds to the first training step of the client, by round.

    Args:
        graph: folder of the expert graph.
        settings: amount of training.
        scratch: folder for logs and files.
        quick: whether the run is short.
    """
    logs = scratch / "logs"
    config = RunConfig(
        graph=str(graph),
        log_dir=str(logs),
        num_clients=1,
        num_rounds=_ROUNDS["quick" if quick else "full"],
        experts_per_token=settings.experts // 2,
        block_size=settings.block_size,
        batch_size=settings.batch_size,
        local_steps=1,
        eval_blocks=1,
        rho_max=0,
        trace_tokens=0,
        device="cpu",
    )
    (source,) = data_sources(settings.domains[-1:], quick=quick)
    node = Node({"data-dir": source}) if Path(source).exists() else Node()
    with deployment(scratch / "flower", [node]) as started:
        follow_run(submit_run(ROOT, config, connection=loopback(started.port)), logs)
    return [client["start_seconds"] for record in read_rounds(logs) for client in record["clients"]]


if __name__ == "__main__":
    run_resumable("start", measure)
