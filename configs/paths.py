"""Where FedGraft keeps things of its own on a user's disk."""

from __future__ import annotations

import os
from pathlib import Path


def cache_folder() -> Path:
    """``$FEDGRAFT_CACHE``, else ``fedgraft`` in the user's cache folder; may not exist yet."""
    if given := os.environ.get("FEDGRAFT_CACHE"):
        return Path(given).expanduser().absolute()
    base = os.environ.get("XDG_CACHE_HOME") or "~/.cache"
    return Path(base).expanduser().absolute() / "fedgraft"


def default_graph() -> Path:
    """The graph that the quick start makes, which runs without a named graph take."""
    return cache_folder() / "graph"
