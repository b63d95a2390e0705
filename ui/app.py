"""The page: its tabs, and what ends a session."""

from __future__ import annotations

from typing import Any

import gradio as gr

from ui.chat.tab import ChatTab
from ui.diff.tab import DiffTab
from ui.experts.tab import ExpertsTab
from ui.run.tab import RunTab
from ui.shared.sessions import Sessions
from ui.shared.workspace import Workspace

TITLE = "FedGraft"


def build_app(workspace: Workspace, sessions: Sessions) -> gr.Blocks:
    """Build the page.

    Args:
        workspace: folders of the server.
        sessions: sessions of the server, which the page opens and closes.
    """
    with gr.Blocks(title=TITLE, analytics_enabled=False, delete_cache=(3600, 86400), fill_width=True) as app:
        gr.HTML(f"<h1 class='fg-title'>{TITLE}</h1>")
        models, runs = [], []
        with gr.Tabs():
            with gr.Tab("Experts", id="experts"):
                models.append(ExpertsTab(workspace, sessions).build())
            with gr.Tab("Run", id="run"):
                run, graph = RunTab(workspace, sessions).build()
                models.append(graph)
            with gr.Tab("Diff", id="diff"):
                runs += [run, *DiffTab(workspace, sessions).build()]
            with gr.Tab("Chat", id="chat"):
                models += ChatTab(workspace, sessions).build()
        app.load(_choices(workspace, len(models), len(runs)), None, [*models, *runs], api_name=False)
        app.unload(_closing(sessions))
    return app


def _choices(workspace: Workspace, models: int, runs: int):
    def choices() -> list[Any]:
        lists = [workspace.models()] * models + [workspace.run_folders()] * runs
        first = str(workspace.model) if workspace.model else None
        return [
            gr.Dropdown(choices=each, value=first if index < models else None)
            for index, each in enumerate(lists)
        ]

    return choices


def _closing(sessions: Sessions):
    def close(request: gr.Request) -> None:
        sessions.close(request.session_hash)

    return close
