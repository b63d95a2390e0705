"""One federation on Flower's simulation engine: its load, and its bytes, CPU seconds and memory."""

from __future__ import annotations

import json
import math
import time
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, replace
from itertools import cycle, islice
from pathlib import Path
from statistics import fmean
from tempfile import TemporaryDirectory
from typing import Any

from benchmarks.scale.apps.costs import COSTS_FILE
from benchmarks.scale.apps.faults import faulty_count
from benchmarks.scale.catch_up import RESIDUAL_DECAY, expected_rounds
from benchmarks.scale.cost_model import PARTS, Load
from benchmarks.scale.graphs import graph_of
from benchmarks.scale.settings import Point, Settings
from benchmarks.support.flower.project import project_with_apps
from benchmarks.support.stored import stored
from configs.schema import RunConfig
from server.flower.simulation import run_simulation
from server.reporting.run_log import read_rounds

_APPS = ("benchmarks.scale.apps.server_app:app", "benchmarks.scale.apps.client_app:app")
_FILES = (
    "/benchmarks/scale/__init__.py",
    "/benchmarks/scale/apps/*.py",
    "/benchmarks/support/process_peak.py",
)
_TIMEOUT = 1200.0  # seconds of a federation
_DEADLINE = 1.0  # seconds after which the replies of the faultless clients end a round


def run_or_read(point: Point, settings: Settings, work: Path) -> dict[str, Any]:
    """Result of a point, read from the folder ``work`` where it is finished; see ``run_point``."""
    amount = {name: value for name, value in asdict(settings).items() if name != "points"}
    facts = {"point": asdict(point), "settings": json.loads(json.dumps(amount))}
    facts["point"].pop("held_out")
    return stored(work, facts, lambda: run_point(point, settings, work))


def run_point(point: Point, settings: Settings, work: Path) -> dict[str, Any]:
    """Run the federation of a point; the folder ``work`` holds the bootstrapped graphs.

    Returns:
        ``rounds``: lines of ``rounds.jsonl``, without what this benchmark does not use; ``costs``: CPU seconds of the
        server by round and part; ``peak_bytes`` of the server's process; ``seconds``.
    """
    started = time.perf_counter()
    graph = graph_of(point.size, work, settings.calibration_tokens)
    with TemporaryDirectory(prefix="fedgraft-") as scratch, project_with_apps(*_APPS, _FILES) as project:
        config = config_of(point, settings, graph, Path(scratch) / "logs")
        run_simulation(
            project,
            run_config=config.values(),
            num_supernodes=point.clients,
            log_dir=Path(config.log_dir),
            timeout=_TIMEOUT,
        )
        rounds = read_rounds(Path(config.log_dir))
        costs = json.loads((Path(config.log_dir) / COSTS_FILE).read_text(encoding="utf-8"))
    return {
        "rounds": [_line(row) for row in rounds],
        "costs": [row for row in costs["rounds"] if row["round"] <= settings.rounds],
        "peak_bytes": costs["peak_bytes"],
        "seconds": round(time.perf_counter() - started, 1),
    }


def config_of(point: Point, settings: Settings, graph: Path, log_dir: Path) -> RunConfig:
    """Run configuration of a point."""
    asked = asked_clients(point, settings)
    return RunConfig(
        graph=str(graph),
        log_dir=str(log_dir),
        partition="iid",
        train_documents=settings.documents,
        num_clients=point.clients,
        num_rounds=settings.rounds,
        budgets=",".join(map(str, _budgets(point, settings))),
        fraction_train=settings.fraction,
        min_clients=asked - 2 * faulty_count(asked),
        round_deadline=_DEADLINE,
        density=point.density,
        downlink_density=settings.downlink_density,
        value_bits=settings.value_bits,
        local_steps=1,
        batch_size=2,
        block_size=32,
        eval_blocks=1,
        assembler_steps=1,
        lookahead_steps=0,
        device="cpu",
    )


def asked_clients(point: Point, settings: Settings) -> int:
    """Clients that are asked in a round."""
    return math.ceil(settings.fraction * point.clients)


def load_of(point: Point, settings: Settings) -> Load:
    """Load of the measured rounds of a point."""
    asked, size = asked_clients(point, settings), point.size
    keys = config_of(point, settings, Path("graph"), Path("logs")).participation
    expected = expected_rounds(_budgets(point, settings), settings.rounds, keys)
    return Load(
        asked=asked,
        used=asked - 2 * faulty_count(asked),
        failed=faulty_count(asked),
        weights=size.weights,
        held=expected.budget / size.experts,
        density=point.density,
        step_density=settings.downlink_density,
        value_bits=settings.value_bits,
        layers=size.layers,
        experts=size.experts,
        missing_steps=expected.missing_steps,
        missing_first=expected.missing_first,
        fresh=expected.fresh,
        kept_steps=settings.rounds,
    )


def load_of_run(load: Load, run: Mapping[str, Any]) -> Load:
    """The load with the budgets and the earlier updates of the clients whose updates were used in a run."""
    earlier = Counter[str]()
    held: list[float] = []
    fresh: list[float] = []
    for row in run["rounds"]:
        used = [client for client in row["clients"] if client["update_bytes"]]
        if row["round"] > 1:
            held += [client["budget"] for client in used]
            fresh += [RESIDUAL_DECAY ** earlier[client["name"]] for client in used]
        earlier.update(client["name"] for client in used)
    return replace(load, held=fmean(held) / load.experts, fresh=fmean(fresh, held))


def quantities(run: Mapping[str, Any], load: Load) -> dict[str, float]:
    """Every quantity of the cost model of a measured run, means over the rounds from the second on."""
    rounds, costs = run["rounds"][1:], run["costs"][1:]
    used = [client for row in rounds for client in row["clients"] if client["update_bytes"]]
    frames = [client["bytes_up"] - client["update_bytes"] for client in used]
    errors = [
        client["bytes_up"]
        for row in rounds
        for client in row["clients"]
        if client["bytes_up"] and not client["update_bytes"]
    ]
    requests = [client["bytes_down"] for client in run["rounds"][0]["clients"]]  # without a step
    return {
        "update_bytes": fmean(client["update_bytes"] for client in used),
        "step_bytes": fmean(row["step_bytes"] for row in rounds),
        "first_step_bytes": run["rounds"][0]["step_bytes"],
        "reply_frame": fmean(frames),
        "error_bytes": fmean(errors or [0]),
        "request_frame": fmean(requests),
        "peak_bytes": run["peak_bytes"],
        **{part: fmean(row.get(part, 0.0) for row in costs) for part in PARTS},
    }


def totals(run: Mapping[str, Any]) -> dict[str, float]:
    """Measured bytes and CPU seconds of a round, means over the rounds from the second on, and the peak memory."""
    rounds, costs = run["rounds"][1:], run["costs"][1:]
    return {
        "bytes_up": fmean(row["bytes_up"] for row in rounds),
        "bytes_down": fmean(row["bytes_down"] for row in rounds),
        "server_seconds": fmean(sum(row.get(part, 0.0) for part in PARTS) for row in costs),
        "peak_bytes": run["peak_bytes"],
    }


def _budgets(point: Point, settings: Settings) -> list[int]:
    shares: Iterable[float] = islice(cycle(settings.shares), point.clients)
    return [max(1, round(share * point.size.experts)) for share in shares]


def _line(row: Mapping[str, Any]) -> dict[str, Any]:
    clients: Sequence[Mapping[str, Any]] = row["clients"]
    kept = ("name", "budget", "bytes_up", "bytes_down", "update_bytes", "refused")
    return {
        **{name: row[name] for name in ("round", "bytes_up", "bytes_down", "step_bytes")},
        "clients": [{name: client[name] for name in kept} for client in clients],
    }
