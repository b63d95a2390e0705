"""Expert graph of a run after its last merge, with the usage of its edges."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from configs.errors import UserError
from experts.graph.edit_plan import apply_plan
from experts.graph.edits import edits_from_dicts
from models.files.checked_file import check_in_turn, tensor_bytes
from models.files.numbered_files import NumberedFiles
from models.files.safetensors_files import read_stored
from models.moe_files.layout import read_moe_layout
from models.moe_files.prune_graph import read_stored_graph
from server.reporting.run_log import MASK_FILE, read_rewirings
from server.state.federation_state import FederationState
from server.state.settings import STATE_FOLDER, read_settings

_FEDERATION = "federation"


@dataclass(frozen=True, eq=False)
class RunGraph:
    """Graph of a run.

    Attributes:
        masks: per layer, bool ``[E, E]``, upper-triangular: edges, and roots on the diagonal.
        usage: per layer, float64 ``[E, E]``, tokens that traveled along each edge, averaged over rounds; None where the
            run has saved none, or of another graph.
    """

    masks: tuple[np.ndarray, ...]
    usage: tuple[np.ndarray, ...] | None


def read_run_graph(log_dir: Path) -> RunGraph:
    """Read the graph that a run started with, apply its edits, and read the usage of the last saved round.

    Raises:
        UserError: the run has no settings yet, or its graph is no longer there.
    """
    settings = read_settings(log_dir / STATE_FOLDER)
    graph = read_stored_graph(read_moe_layout(Path(str(settings.values["graph"]))))
    for rewiring in read_rewirings(log_dir):
        graph = apply_plan(graph, edits_from_dicts(rewiring["edits"])).graph
    usage = _usage(log_dir / STATE_FOLDER)
    fits = [len(each) for each in usage] == graph.num_experts
    return RunGraph(graph.masks, tuple(usage) if fits else None)


def read_first_masks(log_dir: Path) -> np.ndarray | None:
    """First masks of the assembler, bool ``[L, E, E]``; None where there are none."""
    try:
        return np.load(log_dir / MASK_FILE, allow_pickle=False)
    except (FileNotFoundError, ValueError, EOFError):
        return None


def graph_value(graph: RunGraph, layer: int) -> str:
    """Content of the picture of one layer as JSON: roots, and edges with their usage.

    Raises:
        UserError: no such layer.
    """
    if not 0 <= layer < len(graph.masks):
        raise UserError(f"expected a layer from 0 to {len(graph.masks) - 1}, got {layer}")
    mask = graph.masks[layer]
    usage = np.zeros(mask.shape) if graph.usage is None else graph.usage[layer]
    edges = [[int(p), int(q), round(float(usage[p, q]), 1)] for p, q in np.argwhere(np.triu(mask, 1))]
    value = {
        "experts": len(mask),
        "roots": np.flatnonzero(mask.diagonal()).tolist(),
        "entries": [round(float(count), 1) for count in usage.diagonal()],
        "edges": edges,
        "known": graph.usage is not None,
    }
    return json.dumps(value, separators=(",", ":"))


def _usage(folder: Path) -> list[np.ndarray]:
    """Usage of the last intact saved round; empty without one."""
    files = NumberedFiles(folder, "round")
    for number in reversed(files.numbers()):
        if (saved := check_in_turn(files.path(number))) is not None:
            return FederationState.from_bytes(tensor_bytes(read_stored(saved[0][_FEDERATION]))).usage.counts
    return []
