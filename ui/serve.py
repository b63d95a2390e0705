"""Server of the page on 127.0.0.1, without a request off the machine."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

HOST = "127.0.0.1"
# Read by libraries when they are imported, and by the commands that the page starts.
OFFLINE = {"GRADIO_ANALYTICS_ENABLED": "False", "HF_HUB_OFFLINE": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
_FONT = ["system-ui", "sans-serif"]
_MONO = ["ui-monospace", "monospace"]
# Colors of the theme that are too pale to read.
_CONTRAST = {
    "block_info_text_color": "*neutral_600",
    "block_info_text_color_dark": "*neutral_300",
    "block_label_text_color": "*neutral_700",
    "block_title_text_color": "*neutral_800",
    "input_placeholder_color": "*neutral_500",
    "button_primary_background_fill": "*primary_700",
    "button_primary_background_fill_hover": "*primary_800",
    "button_primary_background_fill_dark": "*primary_700",
}
_LARGEST_UPLOAD = "256mb"


@contextmanager
def serving(model: Path | None, runs: Path, *, port: int = 0) -> Iterator[str]:
    """Serve the page for the duration of a ``with`` block; its sessions and temporary files end with it.

    Args:
        model: folder of the base model; None for none.
        runs: folder of the outputs.
        port: TCP port; 0 for a free one.

    Yields:
        Address of the page.
    """
    with tempfile.TemporaryDirectory(prefix="fedgraft-ui-") as folder, _environment(folder):
        import gradio as gr

        from server.flower.flower_process import free_ports
        from ui.app import build_app
        from ui.shared.assets import asset
        from ui.shared.sessions import Sessions
        from ui.shared.workspace import Workspace

        if model is not None:
            import models.moe_files.prune  # noqa: F401 - seconds, which the first selection would wait for

        sessions = Sessions(Path(folder))
        app = build_app(Workspace(model, runs), sessions)
        try:
            _, address, _ = app.queue(default_concurrency_limit=4).launch(
                server_name=HOST,
                server_port=port or free_ports(1)[0],
                prevent_thread_lock=True,
                share=False,
                ssr_mode=False,
                pwa=False,
                quiet=True,
                strict_cors=True,
                enable_monitoring=False,
                max_file_size=_LARGEST_UPLOAD,
                footer_links=["api", "settings"],
                theme=gr.themes.Default(primary_hue="blue", font=_FONT, font_mono=_MONO).set(**_CONTRAST),
                css=asset("page.css"),
            )
            yield address
        finally:
            sessions.close_all()
            app.close(verbose=False)


@contextmanager
def _environment(folder: str) -> Iterator[None]:
    values = {**OFFLINE, "GRADIO_TEMP_DIR": folder}
    before = {name: os.environ.get(name) for name in values}
    os.environ.update(values)
    try:
        yield
    finally:
        for name, value in before.items():
            if value is None:
                os.environ.pop(name, None)
            else:
                os.environ[name] = value
