"""The bootstrapped graph that a client starts from: a folder that it has, or one that it builds from its dense base.

A node whose configuration names ``base``, a folder or hub id of the dense model, and no ``graph`` needs no copy of the
server's graph folder::

    flower-supernode ... --node-config 'partition-id=0 num-partitions=2 base="/models/llama" cache-dir="/var/fedgraft"'

It asks the server once for the recipe of the graph (see ``models.bootstrap.recipe``), builds the graph under
``cache-dir/graphs``, or in the user's cache folder without ``cache-dir``, and uses it in all runs that start from it.
"""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from filelock import FileLock

from configs.errors import UserError
from configs.node_config import NodeConfig
from configs.output import new_directory
from configs.paths import cache_folder, graph_or_default
from configs.schema import RunConfig
from federated.protocol.messages import Request
from models.bootstrap.recipe import graph_fingerprint, read_recipe
from models.bootstrap.recipe_build import build_into

_FINGERPRINT = re.compile("[0-9a-f]{64}")


class NeedsRecipe(RuntimeError):
    """The client has the dense base only and has not built this graph yet."""


def local_graph(config: RunConfig, node: NodeConfig, request: Request) -> str:
    """The graph checkpoint of a node, checked to be the one that the server starts from.

    The node's own ``graph`` counts before its ``base``, these before the run's ``base``, and that before the run's
    ``graph``.

    Args:
        config: of the run.
        node: configuration of the node.
        request: names the graph and may bring its recipe.

    Raises:
        NeedsRecipe: the graph has yet to be built, and the request brings no recipe.
        UserError: another graph than the server's, or a base that it is not made from.
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
    """The folder of the graph, built once; clients of one machine wait for the one that builds it."""
    wanted = request.base_fingerprint
    if not _FINGERPRINT.fullmatch(wanted):
        raise UserError(f"expected a request with the SHA-256 of a graph, got {wanted[:80]!r}")
    folder = cache / "graphs" / wanted
    if _is_built(folder, wanted, cache):
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
    """Whether the graph is there and whole: one that was damaged is built again."""
    try:
        return folder.is_dir() and graph_fingerprint(str(folder), _memory(cache)) == wanted
    except UserError:
        return False


def _build(base: str, request: Request, folder: Path) -> None:
    recipe = read_recipe(request.recipe)
    for abandoned in folder.parent.glob(f".{folder.name}.*.partial"):  # by a process that was killed
        shutil.rmtree(abandoned)
    with new_directory(folder, overwrite=True) as directory:
        build_into(base, recipe, directory)
        if graph_fingerprint(str(directory)) != request.base_fingerprint:
            raise UserError(
                f"expected the server's graph to follow from {base} and its recipe, got another: it has changed since "
                "its bootstrap; copy the server's graph folder to this client and set graph"
            )


def _memory(cache: Path) -> Path:
    return cache / "fingerprints"
