"""ClientApp that reads another data folder from some round on, as a client whose text changes does."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path

from flwr.app import Context, Message

from clients.state.local_copy import client_folder
from configs.node_config import load_node_config
from configs.schema import load_run_config

ClientApp = Callable[[Message, Context], Message]
_BLOCKS_FILE = "blocks.safetensors"  # of the client's text, see ``clients.state.store``


class SwitchedApp:
    """ClientApp some of whose clients have other text after a round.

    Args:
        app: the ClientApp.
        after: last round with the first text.
        folders: data folder from then on, by client index; other clients keep theirs.
    """

    def __init__(self, app: ClientApp, after: int, folders: Mapping[int, Path]) -> None:
        self._app, self._after, self._folders = app, after, folders
        self._switched: set[int] = set()

    def __call__(self, message: Message, context: Context) -> Message:
        partition = int(context.node_config["partition-id"])
        if (
            int(message.metadata.group_id) > self._after
            and partition in self._folders.keys() - self._switched
        ):
            self._switched.add(partition)
            _switch(context, self._folders[partition])
        return self._app(message, context)


def _switch(context: Context, folder: Path) -> None:
    """Name another data folder and remove the blocks that were made of the first one."""
    config, node = load_run_config(context.run_config), load_node_config(context.node_config)
    own = client_folder(config, node, run_id=context.run_id) / f"client-{node.partition_id}"
    (own / _BLOCKS_FILE).unlink()
    context.node_config["data-dir"] = str(folder)
