"""``fedgraft push``: upload of an export to a model hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from scripts.shared.console import print_result, quiet_libraries
from scripts.shared.options import JsonFlag
from scripts.shared.verb import verb


@verb
def push(
    folder: Annotated[Path, typer.Option("--folder", help="Folder of an export.")],
    repository: Annotated[
        str,
        typer.Option(
            "--repository", help="Model repository of the hub, OWNER/NAME; made where it is absent."
        ),
    ],
    private: Annotated[bool, typer.Option(help="Make a new repository private.")] = True,
    revision: Annotated[str | None, typer.Option(help="Branch of the repository; main unless given.")] = None,
    endpoint: Annotated[
        str | None, typer.Option(help="URL of the hub; that of HF_ENDPOINT unless given.")
    ] = None,
    as_json: JsonFlag = False,
) -> None:
    """Upload an export with its model card to a model hub, as one commit.

    The token is that of `hf auth login` or of HF_TOKEN.
    """
    from models.export.push import check_pushable, push_folder

    quiet_libraries()
    check_pushable(folder)
    result = push_folder(folder, repository, private=private, revision=revision, endpoint=endpoint)
    print_result(result, as_json=as_json, lines=[f"uploaded {folder} to {result['url']}"])
