"""Saliency of experts on text: sums of four measures per expert, and their file.

REAP (Lasby et al. 2025, "REAP the Experts", arXiv:2510.13999) scores an expert by the mean, over the tokens routed to
it, of gate times output norm. Routing frequency and expert activation norm (EAN) are the baselines of that paper.
"""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from configs.choices import Metric, check_choice
from configs.errors import UserError
from configs.output import finite, replacing
from experts.saliency.saliency_file import read_arrays

ARRAYS = ("reap_sum", "reap_count", "ean_sum", "freq", "weighted_freq_sum")
_COUNTS = ("reap_count", "freq")


@dataclass(frozen=True, eq=False)
class Saliency:
    """Saliency sums over the tokens of a text. All arrays are float64 ``[L, E]``, L MoE layers of at most E experts.

    A layer with fewer than E experts is padded with NaN, in all arrays alike.

    Attributes:
        reap_sum: gate times output norm, summed over the tokens routed to the expert.
        reap_count: number of tokens in ``reap_sum``.
        ean_sum: output L2 norms, summed over the tokens routed to the expert.
        freq: number of tokens routed to the expert.
        weighted_freq_sum: gates, summed over the tokens routed to the expert.
        decoder_layers: decoder index of each MoE layer, ascending.
        provenance: model and data (model, model_fingerprint, datasets, tokens, ...), JSON values.
        num_shared: shared experts per layer, the first of the layer, which every token visits and no rule removes;
            empty for none in any layer.
    """

    reap_sum: np.ndarray
    reap_count: np.ndarray
    ean_sum: np.ndarray
    freq: np.ndarray
    weighted_freq_sum: np.ndarray
    decoder_layers: list[int]
    provenance: dict[str, Any] = field(default_factory=dict)
    num_shared: tuple[int, ...] = ()

    def __post_init__(self):
        for name in ARRAYS:
            object.__setattr__(self, name, _checked_array(name, getattr(self, name)))
        _check_agreement(self)

    @property
    def num_layers(self) -> int:
        """Number of MoE layers."""
        return len(self.freq)

    @property
    def num_experts(self) -> int:
        """Number of experts of the largest layer."""
        return self.freq.shape[1]

    @property
    def present(self) -> np.ndarray:
        """Existing experts, bool ``[L, E]``."""
        return ~np.isnan(self.freq)

    @property
    def shared_per_layer(self) -> list[int]:
        """Number of shared experts of each layer."""
        return list(self.num_shared) or [0] * self.num_layers

    @property
    def routed(self) -> np.ndarray:
        """Existing experts that the router chooses, i.e. all but the shared ones, bool ``[L, E]``."""
        return self.present & (np.arange(self.num_experts) >= np.asarray(self.shared_per_layer)[:, None])

    @property
    def experts_per_layer(self) -> list[int]:
        """Number of experts of each layer."""
        return self.present.sum(axis=1).tolist()

    def scores(self, metric: str) -> np.ndarray:
        """Scores ``[L, E]`` of a metric, higher is more salient; NaN where the layer has no such expert.

        ``reap`` is the mean over routed tokens, 0 for an expert without tokens; the others are sums.

        Raises:
            UserError: an unknown metric.
        """
        check_choice("`metric`", metric, Metric)
        if metric == "reap":
            return self.reap_sum / np.where(self.reap_count == 0, 1.0, self.reap_count)
        return {"ean": self.ean_sum, "freq": self.freq, "weighted_freq": self.weighted_freq_sum}[
            metric
        ].copy()


def save_saliency(saliency: Saliency, path: Path) -> None:
    """Write a saliency file (.npz), atomically."""
    arrays: dict[str, Any] = {name: getattr(saliency, name) for name in ARRAYS}
    arrays |= {"num_layers": saliency.num_layers, "num_experts": saliency.num_experts}
    arrays["decoder_layers"] = np.asarray(saliency.decoder_layers, dtype=np.int64)
    if any(saliency.num_shared):
        arrays["num_shared"] = np.asarray(saliency.num_shared, dtype=np.int64)
    arrays["provenance"] = np.asarray(json.dumps(finite(saliency.provenance)))
    with replacing(Path(path)) as file:
        np.savez_compressed(file, **arrays)


def load_saliency(path: Path) -> Saliency:
    """Read a saliency file.

    ``decoder_layers`` (default: 0, 1, ...), ``num_shared`` (default: none) and ``provenance`` may be missing.

    Raises:
        UserError: no such file, no .npz archive of plain numbers, a missing key, or impossible values.
    """
    try:
        return Saliency(**read_arrays(Path(path), ARRAYS))
    except UserError as error:
        raise UserError(f"{path}: {error}") from None


def add_saliency(parts: Sequence[Saliency]) -> Saliency:
    """Add saliency sums of one model over several texts.

    Raises:
        UserError: no parts, or parts of different models.
    """
    check_same_model(parts)
    arrays = {name: np.sum([getattr(part, name) for part in parts], axis=0) for name in ARRAYS}
    provenance = _joined_provenance([part.provenance for part in parts])
    first = parts[0]
    return Saliency(
        **arrays,
        decoder_layers=list(first.decoder_layers),
        provenance=provenance,
        num_shared=first.num_shared,
    )


def check_same_model(parts: Sequence[Saliency]) -> None:
    """Refuse saliencies of different models.

    Raises:
        UserError: an empty sequence; experts, shared experts, decoder indices or model fingerprint other than the
            first's.
    """
    if not parts:
        raise UserError("expected at least one saliency file, got none")
    first = parts[0]
    for number, other in enumerate(parts[1:], start=2):
        facts = (
            ("experts per layer", first.experts_per_layer, other.experts_per_layer),
            ("decoder layers", list(first.decoder_layers), list(other.decoder_layers)),
            ("shared experts", first.shared_per_layer, other.shared_per_layer),
            ("model fingerprint", *(part.provenance.get("model_fingerprint") for part in (first, other))),
        )
        for what, expected, got in facts:
            if expected != got and None not in (expected, got):
                raise UserError(
                    f"expected saliency of one model, got other {what} in file {number} ({got}) than in the first "
                    f"({expected}); collect them on the same model"
                )


def _checked_array(name: str, value: Any) -> np.ndarray:
    array = np.asarray(value)
    if array.dtype.kind not in "biuf" or array.ndim != 2 or not array.size:
        raise UserError(f"expected {name} to be numbers [layers, experts], got {array.dtype} {array.shape}")
    array = array.astype(np.float64)
    if np.isinf(array).any():
        raise UserError(f"expected finite values in {name}, got an infinity in layer {_row(np.isinf(array))}")
    if name in _COUNTS and (array < 0).any():
        raise UserError(f"expected counts of at least 0 in {name}, got one below in layer {_row(array < 0)}")
    return array


def _check_agreement(saliency: Saliency) -> None:
    shape, absent = saliency.freq.shape, np.isnan(saliency.freq)
    for name in ARRAYS:
        array = getattr(saliency, name)
        if array.shape != shape:
            raise UserError(f"expected {name} of the shape of freq {shape}, got {array.shape}")
        if (np.isnan(array) != absent).any():
            raise UserError(f"expected NaN in {name} exactly where freq has it, got others in layer "
                            f"{_row(np.isnan(array) != absent)}")  # fmt: skip
    if absent[:, 0].any() or (absent[:, :-1] > absent[:, 1:]).any():
        raise UserError("expected every layer to hold its experts first and NaN only behind them")
    layers = list(saliency.decoder_layers)
    if len(layers) != shape[0] or layers != sorted(set(layers)) or layers[0] < 0:
        raise UserError(f"expected {shape[0]} ascending decoder layers, one per MoE layer, got {layers}")
    shared, counts = saliency.num_shared, saliency.experts_per_layer
    if shared and (
        len(shared) != shape[0] or any(not 0 <= n <= e for n, e in zip(shared, counts, strict=True))
    ):
        raise UserError(f"expected shared experts among the experts per layer {counts}, got {list(shared)}")


def _row(where: np.ndarray) -> int:
    """Index of the first layer with a True."""
    return int(np.argwhere(where)[0, 0])


def _joined_provenance(parts: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """Provenance common to all parts, with their data sets concatenated and their tokens summed."""
    first, *others = parts
    joined = {key: value for key, value in first.items() if all(other.get(key) == value for other in others)}
    if all(isinstance(part.get("datasets"), list) for part in parts):
        joined["datasets"] = list(dict.fromkeys(name for part in parts for name in part["datasets"]))
    if all(isinstance(part.get("tokens"), int) for part in parts):
        joined["tokens"] = sum(part["tokens"] for part in parts)
    return joined
