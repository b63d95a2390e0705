"""Diff tab: layout and callbacks over the functions of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gradio as gr

from configs.choices import Metric
from configs.errors import UserError
from server.reporting.run_log import read_rounds
from ui.diff.differences import (
    difference_figures,
    difference_picture,
    largest_changes,
    layers_table,
    relative_difference,
    run_curves,
    runs_table,
)
from ui.experts.selection import read_files
from ui.shared.callbacks import callback
from ui.shared.heat_map import heat_map
from ui.shared.html import note
from ui.shared.tab import Tab


class DiffTab(Tab):
    """Callbacks of the Differences tab."""

    def compare_files(self, request: gr.Request, first: str | None, second: str | None, metric: str) -> tuple:
        """Heat map, figures, largest changes and layers of two saliency files."""
        paths = [Path(path) for path in (first, second) if path]
        self.sessions.get(request.session_hash).uploads |= set(paths)
        if len(paths) < 2:
            return "", note("Load two saliency files."), "", ""
        one, other = (read_files([path])[0].saliency for path in paths)
        found = relative_difference(one, other, metric)
        figures = ", ".join(f"{name} {value:.4g}" for name, value in difference_figures(found).items())
        return (
            difference_picture(one, other, metric),
            note(f"Score over the layer's mean, second minus first: {figures}."),
            largest_changes(found, one.decoder_layers),
            layers_table(one, other, metric),
        )

    def compare_runs(self, first: str | None, second: str | None) -> tuple[Any, str]:
        """Curves and totals of two runs."""
        folders = [self.workspace.known_run(run) for run in (first, second)]
        if folders[0] == folders[1]:
            raise UserError("expected two different runs, got one twice")
        runs = {str(folder.relative_to(self.workspace.runs)): read_rounds(folder) for folder in folders}
        return run_curves(runs), runs_table(runs)

    def build(self) -> list[gr.Dropdown]:
        """Lay out the tab and connect its callbacks; returns the dropdowns of runs."""
        with gr.Row():
            npz: dict[str, Any] = {"file_types": [".npz"], "height": 110}
            first = gr.File(label="First saliency file", **npz)
            second = gr.File(label="Second saliency file", **npz)
            metric = gr.Dropdown([each.value for each in Metric], value=Metric.REAP.value, label="Metric")
        picture = heat_map("Difference of the scores, by layer", "diff-map")
        figures = gr.HTML(note("Load two saliency files."), label="Figures")
        with gr.Row():
            changes, layers = gr.HTML(label="Largest changes"), gr.HTML(label="Layers")
        gr.on(
            [first.change, second.change, metric.change],
            callback(self.compare_files),
            [first, second, metric],
            [picture, figures, changes, layers],
            api_name="compare_files",
            show_progress="hidden",
            trigger_mode="always_last",
        )
        return self._runs()

    def _runs(self) -> list[gr.Dropdown]:
        with gr.Row():
            runs = [
                gr.Dropdown(label=label, choices=self.workspace.run_folders(), value=None)
                for label in ("First run", "Second run")
            ]
            compare = gr.Button("Compare the runs", min_width=120)
        curves = gr.LinePlot(x="round", y="perplexity", color="run", title="Held-out perplexity", height=260)
        totals = gr.HTML(label="Runs")
        compare.click(
            callback(self.compare_runs),
            runs,
            [curves, totals],
            api_name="compare_runs",
            show_progress="hidden",
        )
        return runs
