"""Expert list: action for each expert, as an editable table (CSV) and as a keep map (JSON)."""

from __future__ import annotations

import csv
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from configs.errors import UserError
from configs.output import finite, write_bytes, write_json
from experts.saliency.measures import Saliency
from experts.selection.expert_list_files import ACTIONS, COLUMNS, VERSION, read_list

CSV_FILE = "filtered_experts.csv"
JSON_FILE = "filtered_experts.json"


@dataclass(frozen=True, eq=False)
class ExpertList:
    """Rank and action of every expert.

    Attributes:
        rank_sum: float64 ``[L, E]``, ranks summed over the saliency files: smaller is better, 1 the best of one file;
            NaN where the layer has no such expert.
        actions: str ``[L, E]``: one of ``ACTIONS``, or empty where the layer has no such expert. ``merge`` removes an
            expert by merging it into one that stays.
        source: ``files, metric, selection_mode, action_mode``.
        filters: ``min_rank, max_rank, n_prune``, and ``guard_top`` where not 0.
    """

    rank_sum: np.ndarray
    actions: np.ndarray
    source: dict[str, Any]
    filters: dict[str, Any]

    def __post_init__(self):
        if self.rank_sum.shape != self.actions.shape or self.rank_sum.ndim != 2:
            raise UserError(
                f"expected ranks and actions [layers, experts], got {self.rank_sum.shape} and {self.actions.shape}"
            )
        if not np.isin(self.actions, (*ACTIONS, "")).all():
            raise UserError(f"expected actions of {', '.join(ACTIONS)}, got {sorted(set(self.actions.flat))}")
        if ((self.actions == "") != np.isnan(self.rank_sum)).any():
            raise UserError("expected an action for every expert that has a rank, and for no other")

    @property
    def keep_map(self) -> dict[int, np.ndarray]:
        """Layer to the sorted ids of the kept experts."""
        return {layer: np.flatnonzero(row == "keep") for layer, row in enumerate(self.actions)}

    @property
    def statistics(self) -> dict[str, int]:
        """Number of layers, experts of the largest layer, kept experts and removed experts."""
        kept = int((self.actions == "keep").sum())
        return {
            "num_layers": self.actions.shape[0],
            "num_experts": self.actions.shape[1],
            "total_kept": kept,
            "total_pruned": int((self.actions != "").sum()) - kept,
        }


def write_expert_list(experts: ExpertList, directory: Path) -> tuple[Path, Path]:
    """Write ``CSV_FILE`` and ``JSON_FILE``, each atomically; return their paths."""
    directory = Path(directory)
    csv_path, json_path = directory / CSV_FILE, directory / JSON_FILE
    write_bytes(csv_path, _csv_text(experts).encode())
    write_json(json_path, _json_value(experts))
    return csv_path, json_path


def load_expert_list(path: Path) -> dict[int, np.ndarray]:
    """Read the kept experts of a CSV or JSON expert list: layer to sorted expert ids (int64).

    Layers may be missing (see ``complete_keep_map``). An expert that a listed layer does not name is removed. A JSON
    list of another version is read with a warning. ``check_keep_map`` compares the result with a model.

    Raises:
        UserError: no such file, neither format, CSV columns missing (named), an unknown action, an expert twice,
            no layer at all.
    """
    return {layer: experts for layer, (experts, _) in read_list(Path(path)).items()}


def read_ranks(path: Path) -> dict[int, dict[int, float]]:
    """Read rank sums of a CSV expert list: layer to expert to rank sum; empty for JSON, which holds none.

    Raises:
        UserError: as ``load_expert_list``.
    """
    return {layer: ranks for layer, (_, ranks) in read_list(Path(path)).items() if ranks}


def check_keep_map(
    keep_map: Mapping[int, np.ndarray], experts_per_layer: Sequence[int], num_shared: Sequence[int] = ()
) -> None:
    """Refuse a keep map that does not fit a model with ``experts_per_layer``.

    Args:
        keep_map: layer to the kept experts; an unnamed layer keeps all.
        experts_per_layer: E of each layer.
        num_shared: shared experts per layer, the first of the layer, all of which must be kept; empty for none.

    Raises:
        UserError: a layer or an expert that the model does not have, an expert twice, a layer without experts, a shared
            expert that is not kept.
    """
    for layer, experts in keep_map.items():
        if not 0 <= layer < len(experts_per_layer):
            raise UserError(
                f"expected layers 0 to {len(experts_per_layer) - 1}, got layer {layer} in the expert list; "
                "layers count those that have experts, from 0"
            )
        ids, number = np.asarray(experts).tolist(), experts_per_layer[layer]
        wrong = [expert for expert in ids if not 0 <= expert < number]
        if wrong:
            raise UserError(f"layer {layer}: expected experts 0 to {number - 1}, got {wrong[0]}; the expert list is "
                            "of another model")  # fmt: skip
        if len(set(ids)) < len(ids):
            raise UserError(f"layer {layer}: expected every expert once, got {ids}")
        if not ids:
            raise UserError(f"layer {layer}: expected at least one expert to keep, got none")
        shared = set(range(num_shared[layer] if num_shared else 0))
        if gone := sorted(shared - set(ids)):
            raise UserError(
                f"layer {layer}: expected the shared experts 0 to {len(shared) - 1} among the kept ones, since every "
                f"token visits them, got a list that removes {', '.join(map(str, gone))}; list them to be kept"
            )


def complete_keep_map(
    keep_map: Mapping[int, np.ndarray],
    experts_per_layer: Sequence[int],
    saliency: Saliency | None = None,
    metric: str = "reap",
    num_shared: Sequence[int] = (),
) -> dict[int, np.ndarray]:
    """Complete a keep map to every layer, in order.

    A missing layer keeps its shared experts and its most salient routed ones, in the same share of routed experts as
    the listed layers together and at least one; without saliency it keeps all.

    Args:
        keep_map: layer to the kept experts.
        experts_per_layer: E of each layer.
        saliency: saliency of the model; None for none.
        metric: saliency measure.
        num_shared: shared experts per layer, the first of the layer; empty for none.

    Raises:
        UserError: as ``check_keep_map``; saliency of a model with other experts.
    """
    check_keep_map(keep_map, experts_per_layer, num_shared)
    if saliency is not None and saliency.experts_per_layer != list(experts_per_layer):
        raise UserError(
            f"expected saliency of a model with {list(experts_per_layer)} experts per layer, got "
            f"{saliency.experts_per_layer}; collect it on this model"
        )
    shared = list(num_shared) or [0] * len(experts_per_layer)
    listed = sum(experts_per_layer[layer] - shared[layer] for layer in keep_map)
    share = sum(len(kept) - shared[layer] for layer, kept in keep_map.items()) / listed if listed else 1.0
    if saliency is None:
        missing = {layer: np.arange(number) for layer, number in enumerate(experts_per_layer)}
    else:
        missing = {
            layer: _best(saliency.scores(metric)[layer, :number], shared[layer], share)
            for layer, number in enumerate(experts_per_layer)
        }
    return {layer: np.sort(keep_map[layer]) if layer in keep_map else best for layer, best in missing.items()}


def _best(scores: np.ndarray, shared: int, share: float) -> np.ndarray:
    """The shared experts, and the share of the others with the highest scores ``[E]``."""
    routed = (
        shared + np.argsort(-scores[shared:], kind="stable")[: max(1, round(share * len(scores[shared:])))]
    )
    return np.concatenate([np.arange(shared), np.sort(routed)])


def _csv_text(experts: ExpertList) -> str:
    text = io.StringIO()
    rows = csv.writer(text, lineterminator="\n")
    rows.writerow(COLUMNS)
    for layer, expert in np.argwhere(experts.actions != ""):
        rank = float(experts.rank_sum[layer, expert])
        shown = int(rank) if rank.is_integer() else rank
        rows.writerow((layer, expert, shown, experts.actions[layer, expert]))
    return text.getvalue()


def _json_value(experts: ExpertList) -> dict[str, Any]:
    return {
        "version": VERSION,
        "source": finite(experts.source),
        "filters": finite(experts.filters),
        "keep_map": {str(layer): ids.tolist() for layer, ids in experts.keep_map.items()},
        "statistics": experts.statistics,
    }
