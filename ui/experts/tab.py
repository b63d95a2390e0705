"""Experts tab: layout and callbacks over the functions of this folder."""

from __future__ import annotations

import shutil
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import gradio as gr

from configs.choices import Action, Metric, SelectionMode
from configs.errors import UserError
from experts.selection.expert_list import ExpertList, write_expert_list
from ui.experts.compression import job_arguments, result_text
from ui.experts.picture import selection_picture
from ui.experts.selection import MOST_FILES, SaliencyFile, SelectionForm, command_lines, read_files, select
from ui.experts.statistics import layer_table, size_preview, totals
from ui.shared.callbacks import callback
from ui.shared.heat_map import heat_map
from ui.shared.html import note, progress_bar
from ui.shared.jobs import Job
from ui.shared.sessions import Session
from ui.shared.tab import MODEL_EVENT, Tab

_FILES = "saliency files"
_CHOSEN = "selection of experts"
_EMPTY = "Load a saliency file (.npz) of `fedgraft saliency collect` to start."


class ExpertsTab(Tab):
    """Callbacks of the Experts tab."""

    def load_saliency(self, request: gr.Request, paths: list[str] | None) -> str:
        """Read 1 to 4 saliency files into the session, in place of its earlier ones."""
        session = self.sessions.get(request.session_hash)
        session.values.pop(_FILES, None)
        if not paths:
            return note(_EMPTY)
        session.uploads |= {Path(path) for path in paths}
        folder = session.new_folder("saliency")
        files = read_files([Path(shutil.copy2(path, folder)) for path in paths])
        session.values[_FILES] = files
        experts = sorted(set(files[0].saliency.experts_per_layer))
        counts = " to ".join(dict.fromkeys((str(experts[0]), str(experts[-1]))))
        return note(f"{len(files)} file(s): {files[0].saliency.num_layers} MoE layers of {counts} experts.")

    def select_experts(
        self,
        request: gr.Request,
        model: str | None,
        metric: str,
        selection_mode: str,
        action: str,
        n_prune: float | None,
        min_rank: str,
        max_rank: str,
        ignore_experts: str,
        guard_top: float | None,
    ) -> Iterator[tuple]:
        """Select experts by the fields of the form; see ``SelectionForm``."""
        session = self.sessions.get(request.session_hash)
        files: list[SaliencyFile] = session.values.get(_FILES, [])
        form = SelectionForm(
            metric, selection_mode, action, n_prune, min_rank, max_rank, ignore_experts, guard_top
        )
        if not files:
            yield ("", note(_EMPTY), "", None, None, "")
            return
        try:
            yield self._selection(session, files, form, model)
        except UserError:
            session.values.pop(_CHOSEN, None)
            # No figure, file or command of an earlier selection stays beside the error.
            yield ("", note("No selection.", error=True), "", None, None, "")
            raise

    def compress(
        self, request: gr.Request, model: str | None, action: str, name: str, equalize: bool, data: str
    ) -> Iterator[tuple[str, Any]]:
        """Prune or merge the model by the session's selection, into a new folder of the runs."""
        session = self.sessions.get(request.session_hash)
        source, out = self.workspace.known_model(model), self.workspace.new_folder(name)
        expert_list = _expert_list(session)
        arguments = job_arguments(action, source, expert_list, out, equalize=equalize, data=data)
        job = session.start(Job(arguments, session.new_folder("job")))
        for step in job.follow():
            yield progress_bar(step.text, step.share), gr.skip()
        text = result_text(job.result(), job.warnings())
        yield note(text), gr.Dropdown(choices=self.workspace.models(), value=model)

    def _selection(
        self, session: Session, files: list[SaliencyFile], form: SelectionForm, model: str | None
    ) -> tuple:
        chosen = select(files, form)
        saliency = files[0].saliency
        csv_path, json_path = write_expert_list(chosen, session.new_folder("selection"))
        session.values[_CHOSEN] = chosen
        known = Path(model) if model and model in self.workspace.models() else None
        summary = f"{totals(chosen, form.action)} {size_preview(known, chosen)}"
        return (
            selection_picture(chosen, files, form),
            note(summary),
            layer_table(chosen, saliency),
            str(csv_path),
            str(json_path),
            command_lines(files, form, model),
        )

    def build(self) -> gr.Dropdown:
        """Lay out the tab and connect its callbacks; returns the dropdown of models."""
        with gr.Row(elem_classes="fg-form"):
            with gr.Column(scale=1, min_width=300):
                files = gr.File(
                    label=f"Saliency files (1 to {MOST_FILES})",
                    file_count="multiple",
                    file_types=[".npz"],
                    height=120,
                )
                loaded = gr.HTML(note(_EMPTY), label="Loaded")
                form = _form()
                model = gr.Dropdown(
                    label="Model", choices=self.workspace.models(), info="For the size and the job."
                )
            with gr.Column(scale=3, min_width=320):
                outputs = _outputs()
                self._job(model, form[2])
        inputs = [model, *form]
        loading = files.change(callback(self.load_saliency), files, loaded, api_name="load_saliency")
        loading.then(callback(self.select_experts), inputs, outputs, api_name=False, show_progress="hidden")
        gr.on(
            [each.change for each in inputs],
            callback(self.select_experts),
            inputs,
            outputs,
            api_name="select_experts",
            show_progress="hidden",
            trigger_mode="always_last",
            concurrency_limit=8,
        )
        return model

    def _job(self, model: gr.Dropdown, action: gr.Radio) -> None:
        with gr.Group(elem_classes="fg-job"):
            with gr.Row():
                name = gr.Textbox(label="Name of the output", placeholder="smaller", max_lines=1)
                data = gr.Textbox(label="Data of a merge", value="wikimix", max_lines=1)
            equalize = gr.Checkbox(label="Equal number in every layer", value=False)
            with gr.Row():
                run = gr.Button("Run prune or merge", variant="primary")
                cancel = gr.Button("Cancel")
        status = gr.HTML(label="Job", elem_id="experts-job")
        run.click(
            callback(self.compress),
            [model, action, name, equalize, data],
            [status, model],
            api_name="compress",
            **MODEL_EVENT,
        )
        cancel.click(callback(self.cancel), None, status, api_name="cancel_job", show_progress="hidden")

    def cancel(self, request: gr.Request) -> str:
        """Cancel the job of the session."""
        return self.cancel_job(request, "canceling")


def _expert_list(session: Session) -> Path:
    """CSV file of the session's selection, which later selections do not replace."""
    chosen: ExpertList | None = session.values.get(_CHOSEN)
    if chosen is None:
        raise UserError("expected a selection of experts, got none; load a saliency file first")
    return write_expert_list(chosen, session.new_folder("expert-list"))[0]


def _outputs() -> list:
    """Components of a selection, in the order of ``ExpertsTab.select_experts``."""
    picture = heat_map("Rank of every expert, by layer", "experts-map")
    summary = gr.HTML(label="Summary", elem_id="experts-summary")
    with gr.Accordion("Layers", open=False):
        layers = gr.HTML(label="Layers")
    with gr.Row():
        csv = gr.DownloadButton("Download CSV", value=None, size="sm")
        json = gr.DownloadButton("Download JSON", value=None, size="sm")
    command = gr.Textbox(label="Command line", interactive=False, lines=2, max_lines=8, buttons=["copy"])
    return [picture, summary, layers, csv, json, command]


def _form() -> list:
    """Components of ``SelectionForm``, in the order of its fields."""
    metric = gr.Dropdown([each.value for each in Metric], value=Metric.REAP.value, label="Metric")
    scope = gr.Radio(
        [("per layer", SelectionMode.PER_LAYER.value), ("model-wide", SelectionMode.MODEL_WIDE.value)],
        value=SelectionMode.PER_LAYER.value,
        label="Scope",
    )
    action = gr.Radio([each.value for each in Action], value=Action.PRUNE.value, label="Action")
    number = gr.Number(
        label="Experts to remove", value=0, minimum=0, precision=0, info="Per layer, or in all."
    )
    with gr.Row():
        low = gr.Textbox(label="Smallest rank", info="Of a removed one.", max_lines=1, min_width=110)
        high = gr.Textbox(label="Largest rank", info="1 is the best.", max_lines=1, min_width=110)
    ignored = gr.Textbox(label="Ignored experts", placeholder="1,2,250..255", max_lines=1)
    guard = gr.Slider(0, 100, value=0, step=1, label="Guard the best % of every layer")
    return [metric, scope, action, number, low, high, ignored, guard]
