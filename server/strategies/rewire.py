"""Graph edits by usage and drift, rolled back where they raise the validation loss too far."""

from __future__ import annotations

from collections.abc import Sequence

from configs.run_views import Rewiring
from experts.graph.edge_edits import propose_edits
from experts.graph.edits import Edit, SpawnExpert
from federated.data.blocks import Blocks
from models.runtime.perplexity import evaluate_loss
from server.model.global_model import GlobalModel
from server.reporting.run_log import RewireRecord
from server.state.federation_state import FederationState
from server.strategies.growth import propose_retirements, propose_spawns


def rewire(
    global_model: GlobalModel, state: FederationState, keys: Rewiring, *, validation: Blocks | None
) -> RewireRecord:
    """Edit the global graph: retire unused new experts, spawn experts after drift, swap edges by usage.

    Args:
        global_model: model whose graph is edited in place.
        state: state after the round. Its usage counts of edited pairs are reset and follow the plan's numbers, and its
            drift detection restarts after a spawn.
        keys: numbers and thresholds of the edits. A rise of the loss (nats per token) above ``merge_max_drift`` undoes
            them all.
        validation: text on which the loss is measured before and after, ``gamma_hat`` being the absolute change per
            edit; None: not measured.
    """
    edits = propose_plan(global_model, state, keys)
    proposed = [edit.as_dict() for edit in edits]
    if not edits or validation is None:
        _apply(global_model, state, edits)
        return RewireRecord(state.server_round, keys.rho_max, proposed, proposed=proposed)
    before = _loss(global_model, validation)
    with global_model.trying(edits):
        after = _loss(global_model, validation)
    accepted = after - before <= keys.merge_max_drift  # also refuses a loss of NaN
    if accepted:
        _apply(global_model, state, edits)
    gamma = abs(after - before) / len(edits)
    made = proposed if accepted else []
    return RewireRecord(state.server_round, keys.rho_max, made, before, after, gamma, proposed)


def propose_plan(global_model: GlobalModel, state: FederationState, keys: Rewiring) -> list[Edit]:
    """At most ``rho_max`` edits: retirements first, then spawned experts after drift, then swaps of edges."""
    graph, usage = global_model.graph, state.usage.counts
    if not usage:
        return []
    edits: list[Edit] = [
        *propose_retirements(graph, usage, most=keys.rho_max, retire_below=keys.retire_below)
    ]
    if state.drift.overall and keys.max_spawned:
        edits += propose_spawns(
            graph,
            usage,
            state.drift.layers,
            most=keys.rho_max - len(edits),
            max_spawned=keys.max_spawned,
        )
    config = global_model.model.config
    margin = max(1.0, (config.experts_per_token - min(config.num_shared)) / 2)
    resting = state.edited.resting(graph, state.server_round, keys.edit_rest)
    edges = propose_edits(graph, usage, keys.rho_max - len(edits), margin=margin, resting=resting)
    return [*edges, *edits]


def _apply(global_model: GlobalModel, state: FederationState, edits: Sequence[Edit]) -> None:
    if not edits:
        return
    state.edited.add(global_model.graph, edits, state.server_round)
    state.usage.reset(edits)
    plan = global_model.edit(edits)
    state.usage.renumber(plan.origins)
    if any(isinstance(edit, SpawnExpert) for edit in edits):
        state.drift.restart()


def _loss(global_model: GlobalModel, validation: Blocks) -> float:
    return evaluate_loss(global_model.model, validation.input_ids, validation.labels).mean
