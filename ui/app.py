"""The page: its tabs, and what ends a session."""

from __future__ import annotations

import gradio as gr

from ui.experts.tab import ExpertsTab
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
        with gr.Tabs(), gr.Tab("Experts", id="experts"):
            models = ExpertsTab(workspace, sessions).build()
        app.load(lambda: gr.Dropdown(choices=workspace.models()), None, models, api_name=False)
        app.unload(_closing(sessions))
    return app


def _closing(sessions: Sessions):
    def close(request: gr.Request) -> None:
        sessions.close(request.session_hash)

    return close
