"""The client's own copy of the global model: where it lies, and how it is brought to the server's version."""

from __future__ import annotations

from pathlib import Path

from flwr.app import Context

from clients.store import ClientStore
from configs.paths import cache_folder
from configs.schema import RunConfig
from federated.messages import Request
from federated.steps import apply_step, steps_after
from federated.update import RefusedUpdate
from models.checkpoint import read_graph
from models.modeling_fedgraft import FedGraftForCausalLM


class VersionMismatch(RuntimeError):
    """The client's copy is not the one that the server's steps start from.

    Args:
        version: what the client holds.
    """

    def __init__(self, version: int) -> None:
        super().__init__(f"holds version {version} of the global model")
        self.version = version


def client_folder(config: RunConfig, context: Context) -> Path:
    """Where the clients of a run keep their files: the node's own ``cache-dir``, else beside the run's logs."""
    if cache := context.node_config.get("cache-dir"):
        return Path(str(cache)) / f"run-{context.run_id}"
    if config.log_dir:
        return Path(config.log_dir) / "clients" / f"run-{context.run_id}"
    return cache_folder() / "runs" / str(context.run_id) / "clients"


def bring_to_version(model: FedGraftForCausalLM, store: ClientStore, request: Request) -> None:
    """Apply the steps that the client misses and keep the result on disk.

    Args:
        model: just opened over ``store.copy``, its experts on disk.
        store: of the client.
        request: names the version and brings steps.

    Raises:
        VersionMismatch: there is a gap between the version on disk and the first step.
        RefusedUpdate: a step is damaged, or the graph differs from the server's afterwards.
    """
    held = store.copy.load(model)
    if held > request.version:  # of another run of the server: only the base is common ground
        store.copy.forget()
        raise VersionMismatch(0)
    missing = steps_after(request.steps, held)
    if len(missing) != request.version - held or any(
        step.version != held + number for number, step in enumerate(missing, start=1)
    ):
        raise VersionMismatch(held)
    moved = set()
    for step in missing:
        moved |= apply_step(model, step)
    digest = read_graph(model).digest()
    if digest != request.graph_hash:
        raise RefusedUpdate(
            f"expected the graph {request.graph_hash[:12]} after {request.version} steps, got {digest[:12]}"
        )
    if missing:
        store.copy.save(model, request.version, moved)
