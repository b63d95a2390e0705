"""Checkpoints of a run under its log directory: the global model and the federation state of a round."""

from __future__ import annotations

import shutil
from pathlib import Path

from configs.output import write_bytes
from server.model.global_model import GlobalModel
from server.state.federation_state import FederationState

CHECKPOINTS = "checkpoints"
_STATE = ".state.safetensors"


def write_checkpoint(
    log_dir: Path, global_model: GlobalModel, state: FederationState, *, keep: int = 0
) -> Path:
    """Write the model and the state after the current round, then remove the oldest; return the folder of the model.

    Args:
        log_dir: log directory of the run.
        global_model: model to write, to ``checkpoints/round-N``.
        state: state to write, to ``checkpoints/round-N.state.safetensors``.
        keep: checkpoints that stay, this one included; 0: all.
    """
    folder = log_dir / CHECKPOINTS / f"round-{state.server_round}"
    global_model.save(folder, overwrite=True)
    write_state(log_dir, state)
    for abandoned in folder.parent.glob(".round-*.partial"):  # left by a process that was killed
        shutil.rmtree(abandoned, ignore_errors=True)
    for earlier in _rounds(log_dir)[:-keep] if keep else ():
        shutil.rmtree(log_dir / CHECKPOINTS / f"round-{earlier}", ignore_errors=True)
        (log_dir / CHECKPOINTS / f"round-{earlier}{_STATE}").unlink(missing_ok=True)
    return folder


def write_state(log_dir: Path, state: FederationState) -> None:
    """Write the state after the current round to ``checkpoints/round-N.state.safetensors``."""
    # Not inside the model's folder: loaders such as vLLM's read every safetensors file of a checkpoint.
    write_bytes(log_dir / CHECKPOINTS / f"round-{state.server_round}{_STATE}", state.to_bytes())


def _rounds(log_dir: Path) -> list[int]:
    """Rounds with a model or a state, ascending."""
    names = {path.name.removesuffix(_STATE) for path in (log_dir / CHECKPOINTS).glob("round-*")}
    return sorted(int(name[6:]) for name in names if name[6:].isascii() and name[6:].isdigit())
