"""Federation of one arm: real server and client apps in one process, and the perplexity of its model."""

from __future__ import annotations

import json
import time
from dataclasses import asdict
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import torch

from benchmarks.privacy.settings import Arm, Settings
from benchmarks.support.federation_run import check_all_used
from benchmarks.support.material import DEMO_MODEL, mixed_blocks, stored_graph
from benchmarks.support.stored import stored
from clients.client_app import app
from federated.data.blocks import Blocks
from models.checkpoints.load import load_graph
from models.runtime.perplexity import evaluate_loss
from server.app import run_federation
from server.flower.in_process_grid import RUN_ID, InProcessGrid
from server.reporting.run_log import read_rounds


def run_or_read(arm: Arm, settings: Settings, work: Path) -> dict[str, Any]:
    """Result of an arm, read from the folder ``work`` where it is finished; see ``run_arm``."""
    amount = {name: value for name, value in asdict(settings).items() if name != "arms"}
    config = settings.config(arm, graph=Path("graph"), folder=Path("run")).values()
    facts = {"settings": amount, "config": config}
    return stored(work, json.loads(json.dumps(facts)), lambda: run_arm(arm, settings, work))


def run_arm(arm: Arm, settings: Settings, work: Path) -> dict[str, Any]:
    """Train the federation of an arm; the folder ``work`` holds the bootstrapped graph.

    Returns:
        ``perplexity`` of the model on the common held-out text, and ``start`` before training; ``epsilon`` and
        ``delta`` from the log of the last round, None without a guarantee; ``seconds``.
    """
    torch.set_num_threads(1)
    started = time.perf_counter()
    graph = stored_graph(
        work,
        model="demo",
        experts=settings.experts,
        calibration_tokens=settings.calibration_tokens,
        seed=settings.seed,
        quick=True,
    )
    with TemporaryDirectory(prefix="fedgraft-") as scratch:
        config = settings.config(arm, graph=graph, folder=Path(scratch))
        nodes = [{"partition-id": index, "num-partitions": arm.clients} for index in range(arm.clients)]
        run_federation(InProcessGrid(app, nodes, config.values()), config, run_id=RUN_ID)
        rounds = read_rounds(Path(config.log_dir))
        check_all_used(rounds)
        text = held_out_text(settings)
        return {
            "perplexity": perplexity(Path(config.out), text),
            "start": perplexity(graph, text),
            "epsilon": rounds[-1]["epsilon"],
            "delta": rounds[-1]["delta"],
            "bytes_up": sum(row["bytes_up"] for row in rounds),
            "seconds": round(time.perf_counter() - started, 1),
        }


def held_out_text(settings: Settings) -> Blocks:
    """Held-out text of the clients' domains; generated, hence public."""
    domains = settings.data.partition(":")[2].split(",")
    return mixed_blocks(
        [f"wikimix:{domain}" for domain in domains],
        str(DEMO_MODEL),
        split="valid",
        block_size=settings.block_size,
        max_blocks=settings.valid_blocks // len(domains),
    )


def perplexity(model: Path, text: Blocks) -> float:
    """Perplexity of a stored graph on blocks of text."""
    return evaluate_loss(load_graph(str(model)), text.input_ids, text.labels).perplexity
