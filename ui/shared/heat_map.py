"""Heat map of a figure per layer and expert, drawn by the browser on a canvas."""

from __future__ import annotations

import base64
import json
from collections.abc import Mapping, Sequence

import gradio as gr
import numpy as np

from ui.shared.assets import asset

MARKS = {"p": "pruned", "m": "merged", "x": "exempt", "s": "shared", "k": "kept", " ": "no expert"}


def heat_map_value(
    values: np.ndarray,
    *,
    rows: Sequence[str],
    fields: Mapping[str, np.ndarray],
    marks: np.ndarray | None = None,
    diverging: bool = False,
) -> str:
    """Content of a heat map as JSON.

    Args:
        values: float ``[L, E]``, colored from the lowest to the highest; NaN where there is no expert.
        rows: L labels.
        fields: further figures ``[L, E]`` by name, shown for the cell in focus.
        marks: str ``[L, E]``, keys of ``MARKS``; none unless given.
        diverging: whether zero is the middle of the color scale.
    """
    present = ~np.isnan(values)
    shown = np.where(present, marks if marks is not None else "k", " ")
    return json.dumps(
        {
            "rows": list(rows),
            "columns": values.shape[1],
            "shade": base64.b64encode(_shades(values, diverging).tobytes()).decode(),
            "marks": "".join(shown.flat),
            "names": MARKS,
            "fields": {name: _rounded(figures) for name, figures in fields.items()},
            "diverging": diverging,
        },
        separators=(",", ":"),
    )


def _shades(values: np.ndarray, diverging: bool) -> np.ndarray:
    """Values as uint8, 0 the lowest and 255 the highest; of a diverging scale 128 is zero."""
    known = values[~np.isnan(values)]
    if diverging:
        reach = max(float(np.abs(known).max(initial=0.0)), np.finfo(float).tiny)
        scaled = 128 + 127 * np.nan_to_num(values) / reach
    else:
        low, high = float(known.min(initial=np.inf)), float(known.max(initial=-np.inf))
        scaled = 255 * (np.nan_to_num(values, nan=low) - low) / max(high - low, np.finfo(float).tiny)
    return np.rint(scaled).astype(np.uint8)


def _rounded(figures: np.ndarray) -> list[float | None]:
    """Figures to 5 significant digits; None for NaN."""
    return [None if np.isnan(value) else float(f"{value:.5g}") for value in figures.flat]


def heat_map(label: str, elem_id: str) -> gr.HTML:
    """Component that shows a ``heat_map_value``; arrow keys move its focus from cell to cell."""
    return gr.HTML(
        value="",
        label=label,
        elem_id=elem_id,
        html_template=asset("heat_map.html").replace("LABEL", label),
        css_template=asset("heat_map.css"),
        js_on_load=asset("heat_map.js"),
    )
