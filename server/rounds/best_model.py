"""Model of the round with the lowest held-out loss, written beside the last one at the end of a run."""

from __future__ import annotations

import logging
import shutil
from collections.abc import Mapping
from functools import partial
from pathlib import Path
from typing import Any

from flwr.common.logger import log

from configs.directory_placement import remove_partials
from configs.errors import UserError
from configs.schema import RunConfig
from federated.run_setup import override_routing
from server.model.global_model import GlobalModel
from server.reporting.summary import model_line
from server.rounds.loop import Federation
from server.state.best_round import BestRound
from server.state.checkpoint import CHECKPOINTS
from server.state.journal import Journal

BEST = "best"


def close_run(federation: Federation, *, out: str) -> dict[str, Any]:
    """Write the summary of a run whose last model is written, and the best model to ``checkpoints/best``.

    With ``keep-best`` only, and not where the last model is the best one. The best model is not in memory: it follows
    from the bootstrapped graph by the saved steps. A failure to write it is logged and named in the summary.

    Args:
        federation: run after its last round.
        out: folder of the last model; empty: it is not written, and neither is the best.

    Returns:
        The summary.
    """
    observer, best, config = federation.observer, federation.state.best, federation.config
    folder = observer.log_dir / CHECKPOINTS / BEST
    shutil.rmtree(folder, ignore_errors=True)  # of an interruption of this run
    remove_partials(folder)
    is_last = best.version == federation.global_model.version
    entry = best.entry(out if is_last else "")
    summary = observer.close(out=out, stopped=federation.state.stopped, best=entry)
    if entry and out and not is_last and config.keep_best and federation.journal is not None:
        source, journal = federation.global_model.source, federation.journal
        write = partial(write_best, best, config, source=source, journal=journal)
        summary = observer.add_best(entry | {"out": str(folder)}, write)
    _log_models(summary)
    return summary


def _log_models(summary: Mapping[str, Any]) -> None:
    """Log round and perplexity of the last and the best model; Flower's own logger shows it in the log of the run."""
    for name, model in (("last", summary["last"] | {"out": summary["out"]}), ("best", summary["best"])):
        if model:
            log(logging.INFO, "%s", model_line(name, model, digits=3))


def write_best(best: BestRound, config: RunConfig, folder: Path, *, source: str, journal: Journal) -> None:
    """Write the model of the best round as a checkpoint.

    Args:
        best: round and version of the model.
        config: run configuration.
        folder: of the checkpoint.
        source: checkpoint folder of the bootstrapped graph.
        journal: saved steps of the run.

    Raises:
        UserError: a step is damaged, or the model is not the one whose loss was measured.
    """
    steps = journal.steps(best.version)
    if steps is None:
        raise UserError(f"expected {best.version} intact steps in {journal.folder}, got a damaged one")
    model = GlobalModel(source)
    override_routing(model.model, config)
    model.replay(steps, {}, kept_from=best.version)
    if model.copy_hash != best.copy_hash:
        raise UserError(f"expected the model of round {best.server_round} from {journal.folder}, got another")
    model.save(folder, overwrite=True, keep=False)
