"""State of an interrupted healing: trained parameters, moments of Adam, and progress, in one file."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import nn
from torch.optim import Optimizer

from configs.errors import UserError
from models.files.checked_file import read_checked, write_checked

_MOMENTS = ("step", "exp_avg", "exp_avg_sq")


@dataclass
class Progress:
    """Progress of healing.

    Attributes:
        step: optimizer steps done.
        total: optimizer steps of the whole run; 0: not yet known.
        tokens: tokens trained on.
        losses: loss of each step, per token.
        seconds: wall time of these steps.
        core_seconds: processor time of these steps, summed over cores.
    """

    step: int = 0
    total: int = 0
    tokens: int = 0
    losses: list[float] = field(default_factory=list)
    seconds: float = 0.0
    core_seconds: float = 0.0


def save_state(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    progress: Progress,
    settings: Mapping[str, Any],
) -> None:
    """Write the state atomically.

    Args:
        path: path of the file.
        parameters: trained parameters by name.
        optimizer: Adam over them.
        progress: progress up to this state.
        settings: facts of the run, which a continuation must have, too; JSON types.
    """
    tensors = {f"parameter {name}": value.detach() for name, value in parameters.items()}
    for name, value in parameters.items():
        moments = optimizer.state.get(value, {})
        tensors |= {f"{moment} {name}": moments[moment] for moment in _MOMENTS if moment in moments}
    facts = {"progress": json.dumps(asdict(progress)), "settings": json.dumps(settings, sort_keys=True)}
    write_checked(path, {name: value.cpu() for name, value in tensors.items()}, facts)


def load_state(
    path: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: Optimizer,
    settings: Mapping[str, Any],
) -> Progress:
    """Restore parameters and moments in place from the file; without a usable file nothing changes.

    Returns:
        The progress of the state, or none.

    Raises:
        UserError: the state is of a run with other settings; names them.
    """
    found = read_checked(path)
    if found is None:
        return Progress()
    tensors, facts = found
    _check_settings(path, json.loads(facts["settings"]), json.loads(json.dumps(settings)))
    with torch.no_grad():
        for name, value in parameters.items():
            value.copy_(tensors[f"parameter {name}"])
            moments = {each: tensors[f"{each} {name}"] for each in _MOMENTS if f"{each} {name}" in tensors}
            if moments:
                optimizer.state[value] = {
                    each: moment if each == "step" else moment.to(value.device)
                    for each, moment in moments.items()
                }
    return Progress(**json.loads(facts["progress"]))


def _check_settings(path: Path, stored: Mapping[str, Any], settings: Mapping[str, Any]) -> None:
    other = sorted(name for name in stored.keys() | settings.keys() if stored.get(name) != settings.get(name))
    if other:
        raise UserError(
            f"expected the settings of the interrupted healing in {path}, got another "
            f"{', '.join(other)}; repeat its command to continue it, or delete the file to start again"
        )
