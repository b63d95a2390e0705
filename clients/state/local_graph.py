"""Bootstrapped graph of a client: an existing folder, or one built from the dense base by the server's recipe.

A node whose configuration names ``base``, a folder or hub id of the dense model, and no ``graph`` needs no copy of the
server's graph folder::

    flower-supernode ... --node-config 'partition-id=0 num-partitions=2 base="/models/llama" cache-dir="/var/fedgraft"'

It requests the recipe of the graph once (see ``models.bootstrap.recipe``), builds the graph under ``cache-dir/graphs``,
or in the user-cache folder without ``cache-dir``, and uses it in all runs that start from the same graph.
"""

from __future__ import annotations

import os
import re
from pathlib import Path

from filelock import FileLock

from configs.directory_placement import remove_partials
from configs.errors import UserError
from configs.node_config import NodeConfig
from configs.output import new_directory
from configs.paths import cache_folder, graph_or_default
from configs.schema import RunConfig
from federated.protocol.messages import Request
from models.bootstrap.recipe import graph_fingerprint, read_recipe
from models.files.safetensors_files import weight_bytes

GRAPHS = "graphs"  # folder in a node's cache

_FINGERPRINT = re.compile("[0-9a-f]{64}")


class NeedsRecipe(RuntimeError):
    """Request for the recipe of a graph that is not built from the dense base yet."""


def local_graph(config: RunConfig, node: NodeConfig, request: Request) -> str:
    """Graph checkpoint of a node, verified against the server's fingerprint.

    Precedence: the node's ``graph``, the node's ``base``, the run's ``base``, the run's ``graph``.

    Args:
        config: run configuration.
        node: node configuration.
        request: fingerprint of the graph, and possibly its recipe.

    Raises:
        NeedsRecipe: the graph is not built yet, and the request has no recipe.
        UserError: another graph than the server's, or a base that it was not built from.
    """
    cache = node_cache(node)
    base = "" if node.graph else node.base or config.base
    if base:
        return str(_built_graph(base, request, cache))
    graph = graph_or_default(node.graph or config.graph)
    if graph_fingerprint(graph, _memory(cache)) != request.base_fingerprint:
        raise UserError(
            f"expected the same bootstrapped checkpoint as the server's, got other weights in {graph}; "
            "copy the server's graph folder to this client, or set base to the dense model"
        )
    return graph


def node_cache(node: NodeConfig) -> Path:
    """Folder of the node's files that outlast a run: its ``cache-dir``, else the user-cache folder."""
    return Path(node.cache_dir) if node.cache_dir else cache_folder()


def _built_graph(base: str, request: Request, cache: Path) -> Path:
    """Folder of the graph, built once per machine under a file lock."""
    wanted = request.base_fingerprint
    if not _FINGERPRINT.fullmatch(wanted):
        raise UserError(f"expected a request with the SHA-256 of a graph, got {wanted[:80]!r}")
    folder = cache / GRAPHS / wanted
    if _is_built(folder, wanted, cache):
        os.utime(folder)  # its last use, see ``prune_cache``
        return folder
    if not request.recipe:
        raise NeedsRecipe(
            "expected a recipe of the server's graph, got none; run `fedgraft bootstrap` on the server again, which "
            "leaves one beside the graph, or copy the graph folder to this client and set graph in its node-config"
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with FileLock(folder.parent / f".{wanted}.lock"):
        if not _is_built(folder, wanted, cache):
            _build(base, request, folder)
    return folder


def _is_built(folder: Path, wanted: str, cache: Path) -> bool:
    """Whether the graph exists and has the wanted fingerprint; a damaged one is built again."""
    try:
        return folder.is_dir() and graph_fingerprint(str(folder), _memory(cache)) == wanted
    except UserError:
        return False


def _build(base: str, request: Request, folder: Path) -> None:
    # Imported here: a node builds a graph once, and each message may start a process.
    from models.bootstrap.recipe_build import build_into

    recipe = read_recipe(request.recipe)
    remove_partials(folder)
    with new_directory(folder, overwrite=True, size=weight_bytes(base)) as directory:
        build_into(base, recipe, directory)
        if graph_fingerprint(str(directory)) != request.base_fingerprint:
            raise UserError(
                f"expected the server's graph to follow from {base} and its recipe, got another: it has changed since "
                "its bootstrap; copy the server's graph folder to this client and set graph"
            )


def _memory(cache: Path) -> Path:
    return cache / "fingerprints"
