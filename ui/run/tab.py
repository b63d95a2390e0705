"""Run tab: layout and callbacks over the functions of this folder."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr
import numpy as np

from configs.errors import UserError
from server.reporting.run_log import ROUNDS_FILE, read_rewirings, read_rounds
from server.reporting.summary import read_summary
from ui.run.current_graph import graph_value, read_first_masks, read_run_graph
from ui.run.records import edits_table, perplexities, rounds_table, state_line, traffic
from ui.run.start import start_arguments
from ui.shared.assets import asset
from ui.shared.callbacks import callback
from ui.shared.heat_map import heat_map, heat_map_value
from ui.shared.html import note, progress_bar
from ui.shared.jobs import Job
from ui.shared.tab import MODEL_EVENT, Tab

_SHOWN = "shown run"
_EMPTY = "Choose a run, or start one."
_SECONDS = 2.0  # between two looks at the log directory


class RunTab(Tab):
    """Callbacks of the Runs tab."""

    def show_run(self, request: gr.Request, run: str | None, layer: float | None) -> tuple:
        """State, curves, tables and graph of a run."""
        if not run:
            return note(_EMPTY), None, None, "", "", "", ""
        log_dir, index = self.workspace.known_run(run), int(layer or 0)
        session = self.sessions.get(request.session_hash)
        session.values[_SHOWN] = (run, index, _written_at(log_dir))
        rounds = read_rounds(log_dir)
        try:
            picture = graph_value(read_run_graph(log_dir), index)
        except UserError:  # no settings yet, a graph that was moved, or no such layer
            picture = ""
        return (
            note(state_line(log_dir, rounds, _summary(log_dir))),
            perplexities(rounds),
            traffic(rounds),
            picture,
            _mask_picture(read_first_masks(log_dir), index),
            rounds_table(rounds),
            edits_table(read_rewirings(log_dir)),
        )

    def refresh(self, request: gr.Request, run: str | None, layer: float | None) -> Any:
        """``show_run`` where the log directory has changed since."""
        if not run or run not in self.workspace.run_folders():
            return (gr.skip(),) * 7
        shown = (run, int(layer or 0), _written_at(Path(run)))
        if self.sessions.get(request.session_hash).values.get(_SHOWN) == shown:
            return (gr.skip(),) * 7
        return self.show_run(request, run, layer)

    def start_run(
        self,
        request: gr.Request,
        name: str,
        graph: str | None,
        clients: float | None,
        rounds: float | None,
        data: str,
        settings: str,
    ) -> Iterator[tuple[str, Any]]:
        """Start a federation and follow it to its end."""
        session = self.sessions.get(request.session_hash)
        log_dir = self.workspace.new_folder(name)
        source = self.workspace.known_model(graph)
        arguments = start_arguments(
            source, log_dir, clients=clients, rounds=rounds, data=data, settings=settings
        )
        job = session.start(Job(arguments, session.new_folder("job")))
        listed = False
        for step in job.follow():
            found = not listed and (log_dir / ROUNDS_FILE).exists()
            listed = listed or found
            yield progress_bar(step.text, step.share), self._runs(str(log_dir)) if found else gr.skip()
        result = job.result()
        yield note(f"Finished after {result['rounds']} rounds: {result['out']}"), self._runs(str(log_dir))

    def list_runs(self, run: str | None) -> Any:
        """Log directories below the folder of runs."""
        return self._runs(run)

    def cancel(self, request: gr.Request) -> str:
        """End the federation of the session; the server saves the model of the last complete round first."""
        return self.cancel_job(request, "ending the run")

    def _runs(self, chosen: str | None) -> Any:
        found = self.workspace.run_folders()
        return gr.Dropdown(choices=found, value=chosen if chosen in found else next(iter(found), None))

    def build(self) -> tuple[gr.Dropdown, gr.Dropdown]:
        """Lay out the tab and connect its callbacks; returns the dropdowns of runs and of graphs."""
        with gr.Row():
            with gr.Column(scale=1, min_width=300):
                run = gr.Dropdown(
                    label="Run",
                    choices=self.workspace.run_folders(),
                    value=None,
                    info="A log directory below the folder of runs.",
                )
                listing = gr.Button("Refresh the list", size="sm")
                layer = gr.Number(label="Layer", value=0, minimum=0, precision=0)
                graph = self._start(run)
            with gr.Column(scale=3, min_width=320):
                outputs = _outputs()
        listing.click(callback(self.list_runs), run, run, api_name="list_runs", show_progress="hidden")
        quiet: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 4}
        gr.on(
            [run.change, layer.change],
            callback(self.show_run),
            [run, layer],
            outputs,
            api_name="show_run",
            trigger_mode="always_last",
            **quiet,
        )
        gr.Timer(_SECONDS).tick(
            callback(self.refresh), [run, layer], outputs, api_name="refresh_run", **quiet
        )
        return run, graph

    def _start(self, run: gr.Dropdown) -> gr.Dropdown:
        with gr.Accordion("Start a federation on this machine", open=False):
            name = gr.Textbox(label="Name of the output", placeholder="run-1", max_lines=1)
            graph = gr.Dropdown(label="Expert graph", choices=self.workspace.models())
            with gr.Row():
                clients = gr.Number(label="Clients", value=2, precision=0, minimum=1, min_width=100)
                rounds = gr.Number(label="Rounds", value=3, precision=0, minimum=1, min_width=100)
            data = gr.Textbox(label="Data, one source per line", value="wikimix", lines=2)
            settings = gr.Textbox(label="Settings, key=value per line", lines=2, placeholder="local-steps=20")
            with gr.Row():
                start = gr.Button("Start", variant="primary", min_width=100)
                end = gr.Button("End the run", min_width=100)
        status = gr.HTML(label="Run job", elem_id="run-job")
        start.click(
            callback(self.start_run),
            [name, graph, clients, rounds, data, settings],
            [status, run],
            api_name="start_run",
            **MODEL_EVENT,
        )
        end.click(callback(self.cancel), None, status, api_name="end_run", show_progress="hidden")
        return graph


def _outputs() -> list:
    """Components of the view of a run, in the order of ``RunTab.show_run``."""
    state = gr.HTML(note(_EMPTY), label="State", elem_id="run-state")
    with gr.Row():
        quality = gr.LinePlot(
            x="round", y="perplexity", color="clients", title="Held-out perplexity", height=260, min_width=300
        )
        sent = gr.LinePlot(
            x="round", y="kilobytes", color="direction", title="Sent so far, kB", height=260, min_width=300
        )
    picture = gr.HTML(
        value="",
        label="Graph",
        elem_id="run-graph",
        html_template=asset("graph.html"),
        css_template=asset("graph.css"),
        js_on_load=asset("graph.js"),
    )
    with gr.Accordion("First mask of the assembler", open=False):
        mask = heat_map("First mask of the assembler", "run-mask")
    with gr.Accordion("Rounds", open=False):
        rounds = gr.HTML(label="Rounds")
    with gr.Accordion("Edits of the graph", open=False):
        edits = gr.HTML(label="Edits")
    return [state, quality, sent, picture, mask, rounds, edits]


def _mask_picture(masks: np.ndarray | None, layer: int) -> str:
    if masks is None or not 0 <= layer < len(masks):
        return ""
    mask = masks[layer]
    return heat_map_value(
        mask.astype(float), rows=[str(p) for p in range(len(mask))], fields={"edge": mask * 1.0}
    )


def _summary(log_dir: Path) -> dict[str, Any] | None:
    try:
        return read_summary(log_dir)
    except (FileNotFoundError, ValueError):
        return None


def _written_at(log_dir: Path) -> tuple:
    """Times of the last writes to what the view shows."""
    found = [*log_dir.glob("*.json*"), *log_dir.glob("*.npy"), *log_dir.glob("state/round-*")]
    return tuple(sorted((path.name, path.stat().st_mtime_ns) for path in found if path.exists()))
