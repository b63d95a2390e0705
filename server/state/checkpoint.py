"""Checkpoints of a run under its log directory: the global model and the federation state of a round."""

from __future__ import annotations

from pathlib import Path

from configs.output import write_bytes
from server.model.global_model import GlobalModel
from server.state.federation_state import FederationState

CHECKPOINTS = "checkpoints"


def write_checkpoint(log_dir: Path, global_model: GlobalModel, state: FederationState) -> Path:
    """Write the model and the state after the current round; return the folder of the model.

    Args:
        log_dir: log directory of the run.
        global_model: model to write, to ``checkpoints/round-N``.
        state: state to write, to ``checkpoints/round-N.state.safetensors``.
    """
    folder = log_dir / CHECKPOINTS / f"round-{state.server_round}"
    global_model.save(folder, overwrite=True)
    write_state(log_dir, state)
    return folder


def write_state(log_dir: Path, state: FederationState) -> None:
    """Write the state after the current round to ``checkpoints/round-N.state.safetensors``."""
    # Not inside the model's folder: loaders such as vLLM's read every safetensors file of a checkpoint.
    path = log_dir / CHECKPOINTS / f"round-{state.server_round}.state.safetensors"
    write_bytes(path, state.to_bytes())
