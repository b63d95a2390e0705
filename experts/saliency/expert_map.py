"""Expert maps: the result of a safety or domain scan, experts flagged by score, and its JSON file."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.output import finite, write_json
from experts.versioned_json import read_versioned_json

KINDS = ("safety", "domain")
VERSION = "1.0"
_FIELDS = ("kind", "scores", "thresholds", "flagged")


@dataclass(frozen=True, eq=False)
class ExpertMap:
    """Scores of experts, with those flagged.

    Attributes:
        kind: one of ``KINDS``.
        scores: float64 ``[L, E]``, NaN where a layer has fewer than E experts.
        thresholds: float64 ``[L]``, smallest flagged score of each layer.
        flagged: MoE-layer ordinal to sorted expert ids; a layer without flagged experts may be missing.
        provenance: model and data of the scores, JSON values.
    """

    kind: str
    scores: np.ndarray
    thresholds: np.ndarray
    flagged: dict[int, np.ndarray]
    provenance: dict[str, Any] = field(default_factory=dict)

    def __post_init__(self):
        if self.kind not in KINDS:
            raise UserError(f"expected an expert map of kind {' or '.join(KINDS)}, got {self.kind!r}")
        if self.scores.ndim != 2 or self.thresholds.shape != self.scores.shape[:1]:
            raise UserError(
                "expected an expert map with scores [layers, experts] and a threshold per layer, got scores "
                f"{self.scores.shape} and thresholds {self.thresholds.shape}"
            )
        for layer, experts in self.flagged.items():
            _check_flagged(self.scores, layer, experts)

    @property
    def mask(self) -> np.ndarray:
        """Flagged experts, bool ``[L, E]``."""
        mask = np.zeros(self.scores.shape, dtype=bool)
        for layer, experts in self.flagged.items():
            mask[layer, experts] = True
        return mask

    @property
    def experts_per_layer(self) -> list[int]:
        """Number of experts of each layer."""
        return (~np.isnan(self.scores)).sum(axis=1).tolist()


def flag_experts(scores: np.ndarray, thresholds: np.ndarray) -> dict[int, np.ndarray]:
    """Experts per layer whose score ``[L, E]`` is at least the layer's threshold ``[L]``; NaN never is."""
    reached = np.greater_equal(scores, thresholds[:, None])
    return {layer: np.flatnonzero(row) for layer, row in enumerate(reached)}


def save_expert_map(
    expert_map: ExpertMap, path: Path, *, statistics: Mapping[str, Any] | None = None
) -> None:
    """Write an expert map (JSON), atomically.

    Args:
        expert_map: expert map.
        path: path of the file.
        statistics: further figures per expert for readers of the file; not read back.
    """
    value = {
        "version": VERSION,
        "kind": expert_map.kind,
        "scores": finite(expert_map.scores),
        "thresholds": finite(expert_map.thresholds),
        "flagged": {str(layer): experts.tolist() for layer, experts in sorted(expert_map.flagged.items())},
        "provenance": finite(expert_map.provenance),
    }
    if statistics is not None:
        value["statistics"] = finite(statistics)
    write_json(Path(path), value)


def load_expert_map(path: Path) -> ExpertMap:
    """Read an expert map; a version other than ``VERSION`` is read with a warning.

    Raises:
        UserError: no such file, no JSON, a field missing or malformed.
    """
    value = read_versioned_json(Path(path), what="an expert map", version=VERSION)
    missing = [name for name in _FIELDS if name not in value]
    if missing:
        raise UserError(
            f"expected an expert map with {', '.join(_FIELDS)}, got {path} without {', '.join(missing)}; "
            "write one with `fedgraft safety-scan` or `fedgraft domain-scan`"
        )
    try:
        return _from_json(value)
    except (TypeError, ValueError, AttributeError, OverflowError) as error:
        raise UserError(f"expected an expert map in {path}, got a malformed one: {error}") from None


def _from_json(value: Mapping[str, Any]) -> ExpertMap:
    flagged = {}
    for layer, ids in value["flagged"].items():
        # numpy would truncate 1.7 to expert 1; bool is a subclass of int.
        if not isinstance(ids, list) or any(type(expert) is not int for expert in ids):
            raise UserError(f"expected lists of expert ids as flagged, got {str(ids)[:80]} in layer {layer}")
        flagged[int(layer)] = np.unique(np.asarray(ids, dtype=np.int64))
    return ExpertMap(
        kind=value["kind"],
        scores=np.asarray(value["scores"], dtype=np.float64),
        thresholds=np.asarray(value["thresholds"], dtype=np.float64),
        flagged=flagged,
        provenance=dict(value.get("provenance", {})),
    )


def _check_flagged(scores: np.ndarray, layer: int, experts: np.ndarray) -> None:
    if not 0 <= layer < len(scores):
        raise UserError(f"expected flagged experts in layers 0 to {len(scores) - 1}, got layer {layer}")
    number = int((~np.isnan(scores[layer])).sum())
    wrong = [int(expert) for expert in experts if not 0 <= expert < number]
    if wrong:
        raise UserError(f"expected flagged experts of layer {layer} to be 0 to {number - 1}, got {wrong[0]}")
