"""Update of the client's copy of the global model to the server's version, and the folder of its files."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from clients.state.store import ClientStore
from configs.node_config import NodeConfig
from configs.paths import cache_folder
from configs.schema import RunConfig
from federated.protocol.messages import Request
from federated.protocol.snapshot import apply_snapshot
from federated.protocol.steps import ServerStep, apply_step, steps_after
from federated.updates.update import RefusedUpdate
from models.graph.graph_state import read_graph
from models.graph.unit_vectors import Unit
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


class VersionMismatch(RuntimeError):
    """Mismatch of the version on the client's disk and the version that the server's steps start from.

    Args:
        version: version on the client's disk.
    """

    def __init__(self, version: int) -> None:
        super().__init__(f"holds version {version} of the global model")
        self.version = version


def client_folder(config: RunConfig, node: NodeConfig, *, run_id: int) -> Path:
    """Folder of the client files of one run: in the node's ``cache-dir``, else in the run's ``log-dir``."""
    if node.cache_dir:
        return Path(node.cache_dir) / f"run-{run_id}"
    if config.log_dir:
        return Path(config.log_dir) / "clients" / f"run-{run_id}"
    return cache_folder() / "runs" / str(run_id) / "clients" / f"run-{run_id}"


def bring_to_version(model: FedGraftForCausalLM, store: ClientStore, request: Request) -> None:
    """Apply the missing steps, or a snapshot, to the client's copy and save the result.

    Args:
        model: graph just opened over ``store.copy``, its experts on disk.
        store: files of the client.
        request: target version and its copy hash, with steps or a snapshot.

    Raises:
        VersionMismatch: the steps do not lead from the version on disk to the server's version or copy.
        RefusedUpdate: damaged steps or snapshot from the checkpoint itself, or a result other than the server's copy.
    """
    if request.snapshot:
        store.copy.start_over()
        moved = apply_snapshot(model, request.snapshot, request.version)
        _check_copy(model, store, request, moved)
        store.copy.save(model, request.version, moved)
        return
    held = store.copy.load(model)
    if held > request.version:  # from another run of the server: only the checkpoint is shared
        store.copy.forget()
        raise VersionMismatch(0)
    missing = steps_after(request.steps, held)
    if len(missing) != request.version - held or any(
        step.version != held + number for number, step in enumerate(missing, start=1)
    ):
        raise VersionMismatch(held)
    try:
        moved = _apply(model, missing)
        _check_copy(model, store, request, moved)
    except RefusedUpdate:
        if held == 0:
            raise
        # The copy itself may be damaged, and then no step would fit it.
        store.copy.forget()
        raise VersionMismatch(0) from None
    if missing:
        store.copy.save(model, request.version, moved)


def _apply(model: FedGraftForCausalLM, steps: Iterable[ServerStep]) -> set[Unit]:
    moved: set[Unit] = set()
    for step in steps:
        moved |= apply_step(model, step)
    return moved


def _check_copy(model: FedGraftForCausalLM, store: ClientStore, request: Request, moved: set[Unit]) -> None:
    graph_hash = read_graph(model).digest()
    if graph_hash != request.graph_hash:
        raise RefusedUpdate(
            f"expected the graph {request.graph_hash[:12]} of version {request.version}, got {graph_hash[:12]}"
        )
    copy_hash = store.copy.hash(model, moved)
    if copy_hash != (request.copy_hash or copy_hash):
        raise RefusedUpdate(
            f"expected the copy {request.copy_hash[:12]} of version {request.version}, got {copy_hash[:12]}"
        )
