"""Cost model of a server round: bytes, CPU seconds and peak memory as functions of clients, model size and density.

Symbols: ``n`` clients asked in a round, ``a`` replies used, ``P`` weights that clients train, ``b`` mean share of them
that a client holds, ``d`` and ``s`` densities of updates and of the server's step, ``v`` bits per value, ``L`` layers
of ``E`` experts, ``g`` steps that an asked client lacks. A column of kept entries at density x takes the entropy of its
positions and its values, ``H(x)/x + v`` bits an entry, times a fitted overhead. All other quantities are linear in the
features of ``FEATURES``, with coefficients of 0 or above that have the least squares of relative errors.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.optimize import nnls

PARTS = ("exchange", "check", "aggregate", "pack", "save", "other")


@dataclass(frozen=True)
class Load:
    """What a round's cost depends on.

    Attributes:
        asked: n.
        used: a.
        failed: clients whose answer is an error.
        weights: P.
        held: b.
        density: d.
        step_density: s.
        value_bits: v.
        layers: L.
        experts: E.
        missing_steps: g, without the step of the first round.
        missing_first: steps of the first round, which are smaller, that an asked client lacks.
        fresh: share of a client's update that it lacks for want of a residual of earlier rounds; 0 in the long run.
        kept_steps: steps that the server keeps in memory, for the client that lacks the most.
    """

    asked: float
    used: float
    failed: float
    weights: float
    held: float
    density: float
    step_density: float
    value_bits: int
    layers: int
    experts: int
    missing_steps: float
    missing_first: float
    fresh: float
    kept_steps: float

    @property
    def update_entries(self) -> float:
        """Kept entries of one client's update."""
        return self.density * self.held * self.weights

    @property
    def step_entries(self) -> float:
        """Kept entries of the server's step."""
        return self.step_density * self.weights

    @property
    def units(self) -> float:
        """Experts of one update."""
        return self.held * self.layers * self.experts

    @property
    def counts(self) -> float:
        """Usage counts of one reply."""
        return self.layers * self.experts**2


def column_bytes(entries: float, density: float, value_bits: int) -> float:
    """Entropy of the positions of uniformly drawn entries, and their values, in bytes."""
    return entries * (position_bits(density) + value_bits) / 8


def position_bits(density: float) -> float:
    """Entropy of the positions at a density, in bits per kept entry."""
    if density >= 1:
        return 0.0
    return -math.log2(density) - (1 - density) / density * math.log2(1 - density)


def _update(load: Load) -> float:
    return column_bytes(load.update_entries, load.density, load.value_bits)


def _step(load: Load) -> float:
    return column_bytes(load.step_entries, load.step_density, load.value_bits)


def _filled(load: Load, times: float) -> float:
    """Share of the step's entries that the updates fill, where they ship ``times`` as many in the mean for each."""
    return 1 - math.exp(-load.used * load.held * load.density / load.step_density / times)


# Features of each quantity. The names are those of the coefficients.
_STEP: dict[str, Callable[[Load], float]] = {
    "per step": lambda load: 1,
    "per entropy byte, common": lambda load: _filled(load, 1) * _step(load),
    "per entropy byte, rare": lambda load: _filled(load, 8) * _step(load),
}
FEATURES: dict[str, dict[str, Callable[[Load], float]]] = {
    "update_bytes": {
        "per entropy byte": lambda load: (1 - load.fresh) * _update(load),
        "per entropy byte, first update": lambda load: load.fresh * _update(load),
    },
    "step_bytes": _STEP,
    "first_step_bytes": _STEP,
    "reply_frame": {"per reply": lambda load: 1, "per usage count": lambda load: load.counts},
    "error_bytes": {"per error": lambda load: 1},
    "request_frame": {"per request": lambda load: 1},
    "exchange": {
        "per round": lambda load: 1,
        "per client": lambda load: load.asked,
        "per update byte": lambda load: load.used * _update(load),
    },
    "check": {
        "per reply": lambda load: load.used,
        "per unit": lambda load: load.used * load.units,
        "per entry": lambda load: load.used * load.update_entries,
    },
    "aggregate": {
        "per weight": lambda load: load.weights,
        "per unit": lambda load: load.used * load.units,
        "per entry": lambda load: load.used * load.update_entries,
    },
    "pack": {"per weight": lambda load: load.weights, "per unit": lambda load: load.layers * load.experts},
    "save": {"per round": lambda load: 1, "per weight": lambda load: load.weights},
    "other": {
        "per round": lambda load: 1,
        "per client": lambda load: load.asked,
        "per weight": lambda load: load.weights,
    },
    "peak_bytes": {"per process": lambda load: 1, "per weight": lambda load: load.weights},
}

# Memory of the replies of a round, apart from their updates, which are on disk: too small to be fitted.
REPLY_MEMORY: dict[str, Callable[[Load], float]] = {
    "per unit": lambda load: load.used * load.units,
    "per usage count": lambda load: load.used * load.counts,
}

Coefficients = dict[str, dict[str, float]]


def fit(loads: Sequence[Load], measured: Sequence[Mapping[str, float]]) -> Coefficients:
    """Coefficients of all quantities from measured runs.

    Args:
        loads: of the runs.
        measured: by run, quantities of ``FEATURES``; one that is 0 or absent is fitted on the other runs.
    """
    return {name: _fit_one(name, loads, [run.get(name, 0.0) for run in measured]) for name in FEATURES}


def _fit_one(name: str, loads: Sequence[Load], values: Sequence[float]) -> dict[str, float]:
    """Coefficients of one quantity; 0 where no run has any of it."""
    rows = [(load, value) for load, value in zip(loads, values, strict=True) if value]
    if not rows:
        return dict.fromkeys(FEATURES[name], 0.0)
    matrix = np.array([[feature(load) for feature in FEATURES[name].values()] for load, _ in rows], float)
    relative = matrix / np.array([[value] for _, value in rows])
    scale = relative.max(axis=0)
    found, _ = nnls(relative / scale, np.ones(len(rows)))
    return dict(zip(FEATURES[name], (found / scale).tolist(), strict=True))


def quantity(name: str, coefficients: Coefficients, load: Load) -> float:
    """Predicted value of one quantity."""
    features = REPLY_MEMORY if name == "reply_memory" else FEATURES[name]
    return sum(coefficients[name][key] * feature(load) for key, feature in features.items())


def predict(coefficients: Coefficients, load: Load) -> dict[str, Any]:
    """Predicted cost of a round.

    Returns:
        ``bytes_up`` and ``bytes_down`` of all clients, ``server_seconds`` of CPU, those of each part in ``parts``, and
        ``peak_bytes`` of the server's process.
    """
    each = {name: quantity(name, coefficients, load) for name in (*FEATURES, "reply_memory")}
    parts = {name: each[name] for name in PARTS}
    return {
        "bytes_up": load.used * (each["update_bytes"] + each["reply_frame"])
        + load.failed * each["error_bytes"],
        "bytes_down": load.asked
        * (
            load.missing_steps * each["step_bytes"]
            + load.missing_first * each["first_step_bytes"]
            + each["request_frame"]
        ),
        "server_seconds": sum(parts.values()),
        "peak_bytes": each["peak_bytes"] + each["reply_memory"] + load.kept_steps * each["step_bytes"],
        "parts": parts,
    }
