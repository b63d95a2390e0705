"""Rescue of the trained model of a run that ends with an exception."""

from __future__ import annotations

import logging
from contextlib import suppress
from pathlib import Path

from configs.output import OutputKept
from configs.schema import RunConfig
from server.reporting.summary import read_summary
from server.rounds.best_model import close_run
from server.rounds.loop import Federation
from server.state.checkpoint import write_checkpoint, write_state

_log = logging.getLogger(__name__)


def save_interrupted(federation: Federation, error: BaseException) -> None:
    """Save model, state and summary of a run that ``error`` ends; nothing before the first trained round.

    The model is written to ``out``, or to ``checkpoints/round-N`` of the log directory where ``out`` is not
    configured or cannot be written; one that could only not be moved to ``out`` stays where ``error`` says. A failure
    to save is logged and does not replace ``error``.

    Args:
        federation: interrupted run.
        error: exception that ends it; its first line becomes ``stopped`` of the summary.
    """
    if not federation.state.server_round:
        return
    federation.state.stopped = next(iter(str(error).splitlines()), type(error).__name__)
    try:
        if isinstance(error, OutputKept):
            folder = error.folder
            write_state(federation.observer.log_dir, federation.state)
        else:
            folder = _save_model(federation, federation.config)
        close_run(federation, out=str(folder))
    except Exception:
        _log.exception("the interrupted run could not be saved")
    else:
        _log.warning("the model after round %d is in %s", federation.state.server_round, folder)


def replacing_own_model(config: RunConfig, log_dir: Path) -> RunConfig:
    """Permit a continued run to replace the model in ``out`` that it saved when it was interrupted."""
    with suppress(FileNotFoundError):
        if config.resume and config.out and read_summary(log_dir)["out"] == config.out:
            return config.model_copy(update={"overwrite": True})
    return config


def interruption_line(log_dir: Path) -> str:
    """Sentence about what an interrupted run has saved, from its log directory."""
    try:
        summary = read_summary(log_dir)
    except FileNotFoundError:
        return f"interrupted before the first round ended; no model was written (logs: {log_dir})"
    where = f"the model after round {summary['rounds']} is in {summary['out']}"
    return (
        f"interrupted; {where}" if summary["out"] else f"interrupted after the last round (logs: {log_dir})"
    )


def _save_model(federation: Federation, config: RunConfig) -> Path:
    global_model, state, log_dir = federation.global_model, federation.state, federation.observer.log_dir
    if config.out:
        try:
            global_model.save(Path(config.out), overwrite=config.overwrite)
            write_state(log_dir, state)
            return Path(config.out)
        except OutputKept as error:
            _log.error("%s", error)
            write_state(log_dir, state)
            return error.folder
        except Exception:
            _log.exception("the model could not be saved to %s", config.out)
    return write_checkpoint(log_dir, global_model, state, keep=config.keep_checkpoints)
