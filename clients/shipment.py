"""Selection of a client's update with error feedback across rounds, refused and lost updates included."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from clients.state.residual import Kept, ShippedUpdate
from configs.errors import UserError
from configs.node_config import NodeConfig
from configs.run_views import Upload
from configs.schema import RunConfig, load_run_config
from experts.graph.expert_graph import ExpertGraph
from federated.protocol.messages import Request
from federated.selection.entries import Score
from federated.selection.error_feedback import Limits, PreparedUpdate, choose_update
from federated.updates.lazy_vectors import LazyVectors
from federated.updates.remap import remap_vector
from federated.updates.update import SparseUpdate, SparseVector, unit_name
from federated.wire.codec import unpack_update
from models.graph.graph_state import read_graph
from models.graph.renumber import id_origins
from models.graph.unit_vectors import OTHERS, Unit, unit_shapes
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


def with_own_limits(config: RunConfig, node: NodeConfig, name: str) -> RunConfig:
    """Run configuration with the node's own ``density`` and ``upload-budget-mb`` in place of the run's.

    A node that sets only a density has no upload budget.

    Args:
        config: run configuration.
        node: node configuration.
        name: client name, for messages.

    Raises:
        UserError: the node's limits conflict with other keys of the run.
    """
    limits = {"density": node.density, "upload-budget-mb": node.upload_budget_mb}
    own = {key: value for key, value in limits.items() if value is not None}
    if not own:
        return config
    if config.entry_score == "shared" and (node.density or 0) > config.density:
        raise UserError(
            f"expected density of at most the run's {config.density:g} with entry-score=shared, got {node.density:g} "
            f"in the node-config of client {name}; the server takes entries of the common draw only"
        )
    try:
        return load_run_config({**config.values(), "upload-budget-mb": 0.0, **own})
    except UserError as error:
        raise UserError(f"{error} in the node-config of client {name}") from None


def limits(upload: Upload) -> Limits:
    """Size limits of one update."""
    return Limits(
        per_layer=upload.ship_experts,
        density=upload.density,
        scope=upload.density_scope,
        max_bytes=upload.max_bytes,
    )


def choose_shipment(
    model: FedGraftForCausalLM,
    deltas: Mapping[Unit, Tensor],
    score: Score,
    residual: Mapping[Unit, Tensor],
    upload: Upload,
    *,
    generator: torch.Generator,
    in_memory: bool = False,
) -> PreparedUpdate:
    """Select an update from ``deltas`` and the residual, and the new residual.

    Args:
        model: model after local training, for its graph.
        deltas: change ``[size]`` of each trained unit.
        score: ranking of entries.
        residual: residual of earlier rounds, from ``carried_over``.
        upload: keys of the upload, with the client's own limits.
        generator: random generator of the draw of experts.
        in_memory: see ``choose_update``.

    Raises:
        UserError: as ``federated.selection.error_feedback.choose_update``.
    """
    graph = read_graph(model)
    return choose_update(
        deltas,
        residual,
        limits(upload),
        score=score,
        shapes=unit_shapes(model) if upload.low_rank else None,
        selection=upload.selection,
        unbiased=upload.unbiased,
        value_bits=upload.value_bits,
        residual_decay=upload.residual_decay,
        graph_version=graph.version,
        graph_hash=graph.digest(),
        generator=generator,
        in_memory=in_memory,
    )


def drawn_with(prepared: PreparedUpdate) -> dict[str, float]:
    """Inclusion probability of each shipped expert, where it is below 1: ``"layer.expert" -> pi``."""
    return {unit_name(unit): pi for unit, pi in prepared.inclusion.items() if pi < 1}


def carried_over(
    kept: Kept, request: Request, sizes: Mapping[Unit, int], graph: ExpertGraph
) -> Mapping[Unit, Tensor]:
    """Residual on the client's disk, plus the last update where the server did not aggregate it.

    Experts are found by their identities where edits renumbered them since; residuals of retired ones are dropped.

    Args:
        kept: state on the client's disk.
        request: names the last accepted update; a request that repeats a round cannot have accepted it.
        sizes: entries of every unit of the current graph; residuals of units of other sizes are dropped.
        graph: current graph.
    """
    counts = [len(ids) for ids in kept.ids] or graph.num_experts
    origins = id_origins(kept.ids or graph.ids_per_layer, graph.ids_per_layer)

    def before(unit: Unit) -> Unit:
        return unit if unit[1] == OTHERS else (unit[0], int(origins[unit[0]][unit[1]]))

    def size_before(unit: Unit) -> int:
        added = 0 if unit[1] == OTHERS else len(origins[unit[0]]) - counts[unit[0]]
        return sizes[unit] - 2 * added

    residual = {unit for unit in sizes if kept.sizes.get(before(unit)) == size_before(unit)}
    shipped = _refused(kept.shipped, request)
    refused = {unit for unit in sizes if _size(shipped.get(before(unit))) == size_before(unit)}

    def vector(unit: Unit) -> Tensor:
        old = before(unit)
        stored = kept.residual[old] if unit in residual else torch.zeros(size_before(unit))
        total = _add(stored, shipped[old]) if unit in refused else stored
        return total if unit[1] == OTHERS else remap_vector(total, origins[unit[0]], counts[unit[0]])

    return LazyVectors([unit for unit in sizes if unit in residual or unit in refused], vector)


def shipped_in(request: Request, update: SparseUpdate, packed: bytes) -> ShippedUpdate:
    """Record of a shipped update, kept until the server reports whether it was aggregated."""
    sizes = {unit: vector.size for unit, vector in update.vectors.items()}
    return ShippedUpdate(request.server_round, packed, sizes)


def _refused(shipped: ShippedUpdate | None, request: Request) -> dict[Unit, SparseVector]:
    """Vectors of the last update where the server did not aggregate it, by unit of the graph of then."""
    if shipped is None or shipped.server_round == request.accepted_round != request.server_round:
        return {}
    return dict(unpack_update(shipped.packed, sizes=shipped.sizes).vectors)


def _size(vector: SparseVector | None) -> int | None:
    return None if vector is None else vector.size


def _add(stored: Tensor, shipped: SparseVector) -> Tensor:
    total = stored.clone()
    total[torch.from_numpy(shipped.indices)] += torch.from_numpy(shipped.values)
    return total
