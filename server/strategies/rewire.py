"""Graph edits by usage, rolled back where they raise the validation loss too far."""

from __future__ import annotations

from collections.abc import Sequence

from experts.graph.edge_edits import propose_edits
from experts.graph.edits import EdgeEdit
from federated.data.blocks import Blocks
from models.runtime.perplexity import evaluate_loss
from server.model.global_model import GlobalModel
from server.reporting.run_log import RewireRecord
from server.state.usage_average import UsageAverage


def rewire(
    global_model: GlobalModel,
    usage: UsageAverage,
    *,
    server_round: int,
    rho_max: int,
    validation: Blocks | None,
    max_drift: float,
) -> RewireRecord:
    """Edit the edges of the global graph by usage: drop the least traveled, add the most demanded.

    Args:
        global_model: model whose graph is edited in place.
        usage: moving average of usage; the counts of edited pairs are reset.
        server_round: current round.
        rho_max: most edits.
        validation: text on which the loss is measured before and after, ``gamma_hat`` being the absolute change per
            edit; None: not measured.
        max_drift: rise of that loss (nats per token) above which no edit is made.
    """
    config = global_model.model.config
    margin = max(1.0, (config.experts_per_token - min(config.num_shared)) / 2)
    edits = propose_edits(global_model.graph, usage.counts, rho_max, margin=margin) if usage.counts else []
    if not edits or validation is None:
        _apply(global_model, usage, edits)
        return RewireRecord(server_round, rho_max, _as_dicts(edits))
    before = _loss(global_model, validation)
    with global_model.trying(edits):
        after = _loss(global_model, validation)
    gamma = abs(after - before) / len(edits)
    if not after - before <= max_drift:  # also refuses a loss of NaN
        return RewireRecord(server_round, rho_max, [], before, after, gamma)
    _apply(global_model, usage, edits)
    return RewireRecord(server_round, rho_max, _as_dicts(edits), before, after, gamma)


def _apply(global_model: GlobalModel, usage: UsageAverage, edits: list[EdgeEdit]) -> None:
    if edits:
        global_model.edit(edits)
        usage.reset(edits)


def _loss(global_model: GlobalModel, validation: Blocks) -> float:
    return evaluate_loss(global_model.model, validation.input_ids, validation.labels).mean


def _as_dicts(edits: Sequence[EdgeEdit]) -> list[dict]:
    return [edit.as_dict() for edit in edits]
