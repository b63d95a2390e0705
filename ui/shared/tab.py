"""Base class of the tabs: folders, sessions, and cancellation of the session's job."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import gradio as gr

from ui.shared.html import note, progress_bar
from ui.shared.sessions import Sessions
from ui.shared.workspace import Workspace

# Options of an event that computes with a model: of the whole page, one at a time.
MODEL_EVENT: dict[str, Any] = {"show_progress": "hidden", "concurrency_limit": 1, "concurrency_id": "model"}


@dataclass(frozen=True)
class Tab:
    """Callbacks of a tab.

    Attributes:
        workspace: folders of the server.
        sessions: open sessions.
    """

    workspace: Workspace
    sessions: Sessions

    def cancel_job(self, request: gr.Request, text: str) -> str:
        """Cancel the job of the session; returns HTML with ``text``, or that nothing runs."""
        job = self.sessions.get(request.session_hash).job
        if job is None or not job.running:
            return note("Nothing runs.")
        job.cancel()
        return progress_bar(text, None)
