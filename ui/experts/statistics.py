"""Statistics of a selection of experts: removed experts per layer, totals and the size of the smaller model."""

from __future__ import annotations

from html import escape
from pathlib import Path

import numpy as np

from configs.choices import Action
from configs.errors import UserError
from experts.saliency.measures import Saliency
from experts.selection.expert_list import ExpertList
from ui.shared.html import table

_MOST_NAMES = 24


def layer_table(chosen: ExpertList, saliency: Saliency) -> str:
    """HTML table of the layers: experts, kept, removed, and the removed ones, the worst first."""
    rows = []
    for layer, actions in enumerate(chosen.actions):
        gone = np.flatnonzero(np.isin(actions, ("prune", "merge")))
        worst = gone[np.argsort(-chosen.rank_sum[layer, gone], kind="stable")].tolist()
        names = ", ".join(map(str, worst[:_MOST_NAMES])) + (" …" if len(worst) > _MOST_NAMES else "")
        number = saliency.experts_per_layer[layer]
        rows.append(
            [layer, saliency.decoder_layers[layer], number, number - len(gone), len(gone), names or "none"]
        )
    return table(("layer", "decoder layer", "experts", "kept", "removed", "removed, worst first"), rows)


def totals(chosen: ExpertList, action: str) -> str:
    """Sentence with the number of layers, of experts kept and of experts removed."""
    found = chosen.statistics
    done = {"merge": "merged", "prune": "pruned"}.get(action, "removed")
    text = (
        f"{found['num_layers']} layers, {found['total_kept']} experts kept, {found['total_pruned']} {done}."
    )
    if action != Action.ANALYZE and not found["total_pruned"]:
        text += " Nothing to remove yet: set the number of experts to remove."
    return text


def size_preview(model: Path | None, chosen: ExpertList) -> str:
    """Sentence with parameters and bytes of the checkpoint before and after; says why where they are unknown."""
    if model is None:
        return "Size: choose a model to see it."
    from models.moe_files.prune import preview_prune

    try:
        report = preview_prune(model, chosen.keep_map)
    except UserError as error:
        return f"Size: unknown: {escape(' '.join(str(error).split()))}."
    parts = [
        f"{_short(before)} → {_short(after)} {what} ({after / before:.1%})"
        for what, before, after in (
            ("parameters", report.parameters_before, report.parameters_after),
            ("bytes", report.bytes_before, report.bytes_after),
        )
    ]
    return "Size: " + ", ".join(parts) + "." + "".join(f" {escape(text)}." for text in report.warnings)


def _short(number: int) -> str:
    """Number with a suffix for thousands, millions or billions."""
    for power, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if number >= power:
            return f"{number / power:.2f} {suffix}"
    return str(number)
