"""FedGraft's folders in the user's cache, and the default graph in it."""

from __future__ import annotations

import os
from pathlib import Path

from configs.errors import UserError


def cache_folder() -> Path:
    """``$FEDGRAFT_CACHE``, else ``fedgraft`` in the user's cache folder; may not exist yet."""
    if given := os.environ.get("FEDGRAFT_CACHE"):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "fedgraft"


def default_graph() -> Path:
    """Folder of the graph that the quick start writes, for runs that name no graph."""
    return cache_folder() / "graph"


def graph_or_default(graph: str) -> str:
    """Graph of a configuration, or that of the quick start for a configuration without one.

    Raises:
        UserError: no graph is set, and the quick start has not written one.
    """
    if graph:
        return graph
    if not (default_graph() / "config.json").is_file():
        raise UserError(
            f"expected a graph, got none named and none in {default_graph()}; "
            "set graph to a folder that `fedgraft bootstrap` wrote, or run scripts/quickstart.sh first"
        )
    return str(default_graph())
