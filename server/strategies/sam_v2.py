"""SAM-v2: sparse updates of experts, combined per entry or unit, and graph edits by usage."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence

import numpy as np
from torch import Tensor

from configs.run_views import Aggregation, Rewiring
from configs.schema import RunConfig
from federated.aggregation.agreement import opposed
from federated.aggregation.combine import aggregate
from federated.aggregation.contribution import Contribution
from federated.aggregation.usage import combine_usage, unpack_usage
from federated.data.blocks import Blocks, take
from federated.protocol.messages import Reply, Request
from models.graph.unit_vectors import Unit, unit_sizes
from server.model.global_model import GlobalModel
from server.reporting.run_log import RewireRecord
from server.state.federation_state import FederationState
from server.state.node_session import NodeSession
from server.strategies.rewire import rewire
from server.strategies.strategy import Accepted, PackedUpdate
from server.strategies.update_checks import (
    check_residents,
    check_size,
    client_weight,
    decode_checked,
    inclusion_probabilities,
    trained_units,
)

_log = logging.getLogger(__name__)


class SamV2:
    """Strategy of FedGraft's own method.

    Args:
        aggregation: keys of the combination of updates.
        rewiring: keys of the graph edits.
        attention: whether clients train attention projections, too.
        num_rounds: planned rounds, the last of which is announced to the clients.
        counts_usage: whether clients report usage counts.
        validation: the server's own text, on which the loss around graph edits is measured; None: not measured.
    """

    def __init__(
        self,
        *,
        aggregation: Aggregation,
        rewiring: Rewiring,
        attention: bool,
        num_rounds: int,
        counts_usage: bool = True,
        validation: Blocks | None = None,
    ) -> None:
        self._aggregation, self._rewiring, self._counts_usage = aggregation, rewiring, counts_usage
        self._attention, self._num_rounds, self._validation = attention, num_rounds, validation

    def configure(self, global_model: GlobalModel, session: NodeSession, server_round: int) -> Request:
        """Request local training or evaluation, with the missing steps or a snapshot."""
        steps, snapshot = global_model.catch_up(session.held_version)
        return Request(
            server_round=server_round,
            version=global_model.version,
            graph_hash=global_model.graph.digest(),
            base_fingerprint=global_model.fingerprint,
            copy_hash=global_model.copy_hash,
            steps=steps,
            snapshot=snapshot,
            last=server_round == self._num_rounds,
            accepted_round=session.accepted_round,
        )

    def accept(self, node: int, reply: Reply, packed: PackedUpdate, global_model: GlobalModel) -> Accepted:
        """Validate residents, weight, inclusion probabilities, usage counts and the sparse update.

        Raises:
            RefusedUpdate: one of them is invalid.
        """
        graph = global_model.graph
        sizes = unit_sizes(global_model.model, attention=self._attention)
        weight = client_weight(reply, self._aggregation.client_weight)
        check_residents(reply, num_layers=len(graph.masks))
        check_size(packed.size, sizes)
        trained = trained_units(reply, sizes)
        inclusion = inclusion_probabilities(reply, trained)
        usage = unpack_usage(reply.usage, graph.num_experts) if self._counts_usage else []
        unpack, summary, stats = decode_checked(packed, graph, sizes, trained)
        return Accepted(node, reply, Contribution(weight, unpack, inclusion, trained, summary), usage, stats)

    def combine(self, accepted: Sequence[Accepted], global_model: GlobalModel) -> Mapping[Unit, Tensor]:
        """Combine updates per ``combine``, with norm clipping and the server learning rate; none that is opposed."""
        return aggregate(
            self._unopposed(accepted),
            combine=self._aggregation.combine,
            server_learning_rate=self._aggregation.server_learning_rate,
            clip_norm_multiple=self._aggregation.clip_norm_multiple,
            clip_unit_multiple=self._aggregation.clip_unit_multiple,
            trim_share=self._aggregation.trim_share,
        )

    def combine_usage(self, accepted: Sequence[Accepted], global_model: GlobalModel) -> list[np.ndarray]:
        """Sum of the clients' counts in which none of them decides alone (``federated.aggregation.usage``)."""
        return combine_usage([each.usage for each in accepted])

    def _unopposed(self, accepted: Sequence[Accepted]) -> list[Contribution]:
        contributions = [each.contribution for each in accepted]
        against = opposed(contributions, limit=self._aggregation.opposition_limit)
        for each, is_against in zip(accepted, against, strict=True):
            if is_against:
                _log.warning("the update of node %s points against most others and is left out", each.node)
        return [each for each, is_against in zip(contributions, against, strict=True) if not is_against]

    def after_round(self, global_model: GlobalModel, state: FederationState) -> RewireRecord | None:
        """Edit the graph by usage and drift every ``merge-every`` rounds."""
        keys = self._rewiring
        if not keys.rho_max or state.server_round % keys.merge_every:
            return None
        return rewire(global_model, state, keys, validation=self._validation)


def sam_v2(config: RunConfig, *, validation: Blocks | None = None) -> SamV2:
    """Build SAM-v2 from a run configuration.

    Args:
        config: run configuration.
        validation: the server's own text, of which ``eval-blocks`` blocks are used; None: without any.
    """
    return SamV2(
        aggregation=config.aggregation,
        rewiring=config.rewiring,
        attention=config.attention_lora,
        num_rounds=config.num_rounds,
        counts_usage=config.privacy.counts_usage,
        validation=take(validation, config.eval_blocks) if validation is not None else None,
    )
