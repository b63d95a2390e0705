"""Removal of client files that no run has used for a time, so that a cache folder does not grow without bound."""

from __future__ import annotations

import shutil
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path

from clients.state.local_copy import client_folder
from clients.state.local_graph import GRAPHS, node_cache
from configs.node_config import NodeConfig
from configs.paths import cache_folder
from configs.schema import RunConfig

_SECONDS_PER_DAY = 86_400


def prune_cache(config: RunConfig, node: NodeConfig, *, run_id: int) -> None:
    """Remove the files of other runs, and built graphs, that were not used for ``cache-days`` or exceed ``cache-mb``.

    Only at the first message of a run, before it has files. The last use is the newest modification; the longest unused
    are removed first.

    Args:
        config: run configuration.
        node: node configuration; names the folder, the number of days and the size.
        run_id: id of the run.
    """
    own = client_folder(config, node, run_id=run_id)
    if not (node.cache_days or node.cache_mb) or own.exists():
        return
    oldest = time.time() - node.cache_days * _SECONDS_PER_DAY if node.cache_days else 0.0
    limit = node.cache_mb * 2**20 if node.cache_mb else float("inf")
    total = 0
    for used, folder in sorted(((_last_use(folder), folder) for folder in _folders(own, node)), reverse=True):
        total += _size(folder)
        if used < oldest or total > limit:
            shutil.rmtree(folder, ignore_errors=True)  # another client may remove it, too


def _folders(own: Path, node: NodeConfig) -> Iterator[Path]:
    """Folders of runs beside ``own`` or in the user's cache, and built graphs."""
    yield from own.parent.glob("run-*")
    if own.is_relative_to(cache_folder()) and not node.cache_dir:
        yield from (cache_folder() / "runs").glob("*/clients/run-*")
    for folder in (node_cache(node) / GRAPHS).glob("*"):
        if folder.is_dir():
            yield folder


def _size(folder: Path) -> int:
    """Bytes of all files of a folder; those that are removed meanwhile are left out."""
    total = 0
    for path in folder.rglob("*"):
        with suppress(FileNotFoundError):
            total += path.stat().st_size if path.is_file() else 0
    return total


def _last_use(folder: Path) -> float:
    """Newest modification of a folder and everything in it; infinity where it is removed meanwhile."""
    with suppress(FileNotFoundError):
        return max(path.stat().st_mtime for path in (folder, *folder.rglob("*")))
    return float("inf")
