"""``fedgraft ui``: the web page of the workbench."""

from __future__ import annotations

import threading
from importlib.util import find_spec
from pathlib import Path
from typing import Annotated

import typer

from configs.errors import UserError
from scripts.shared.console import stderr
from scripts.shared.verb import verb


@verb
def ui(
    model: Annotated[
        Path | None,
        typer.Option(
            help="Directory of the base model: an expert graph or a mixture of experts; none: saliency files only."
        ),
    ] = None,
    runs: Annotated[
        Path,
        typer.Option(
            help="Directory of runs and outputs; every checkpoint that the page writes is a folder in it."
        ),
    ] = Path("logs"),
    port: Annotated[int, typer.Option(min=0, max=65535, help="TCP port on 127.0.0.1; 0: a free one.")] = 0,
) -> None:
    """Serve the web page of the workbench on 127.0.0.1: experts, runs, differences, chat.

    Nothing is requested from other machines, and only this machine can open the page. Ctrl-C ends it.
    """
    from ui.serve import serving

    if find_spec("gradio") is None:
        raise UserError(
            "expected the extra `ui`, got no gradio; install it with `bash scripts/install.sh ui`"
        )
    if model is not None and not (model / "config.json").is_file():
        raise UserError(f"expected the directory of a model as `model`, got {model} without config.json")
    with serving(model, runs, port=port) as address:
        stderr.print(f"the page is at {address} (Ctrl-C ends it)", highlight=False, soft_wrap=True)
        threading.Event().wait()
