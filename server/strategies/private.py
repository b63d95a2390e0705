"""Client-level differential privacy around a federated method: clipped sums with Gaussian noise at shared positions."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from configs.run_views import Privacy
from configs.schema import RunConfig
from federated.aggregation.private_sum import Positions, check_positions, clipped_sum, unit_norm_sum
from federated.protocol.messages import Reply, Request
from federated.selection.shared_entries import SharedEntries
from federated.updates.update import parse_unit, unit_name
from models.graph.unit_vectors import Unit, trained_spans, unit_sizes
from server.model.global_model import GlobalModel
from server.privacy.noise import NoiseSource
from server.reporting.run_log import RewireRecord
from server.state.federation_state import FederationState
from server.state.node_session import NodeSession
from server.strategies.strategy import Accepted, PackedUpdate, Strategy

# Usage counts of one client have this norm, so that sums of them are of the order of counts in logs and reasons.
_USAGE_NORM = 1000.0


class PrivateAggregation:
    """Strategy that replaces the combination of another one by the Gaussian mechanism.

    Every entry of the round's shared draw is released with noise, whether clients shipped it or not, and every client
    counts alike over a fixed number of clients: neither positions nor divisors depend on data.

    Args:
        inner: method that requests, validates and edits the graph.
        config: run configuration.
        noise: source of the noise.
    """

    def __init__(self, inner: Strategy, config: RunConfig, noise: NoiseSource) -> None:
        self._inner, self._config, self._noise = inner, config, noise
        self._keys: Privacy = config.privacy
        self._draw: tuple[int, Positions] = (0, {})

    def configure(self, global_model: GlobalModel, session: NodeSession, server_round: int) -> Request:
        """Request as the other method does."""
        return self._inner.configure(global_model, session, server_round)

    def accept(self, node: int, reply: Reply, packed: PackedUpdate, global_model: GlobalModel) -> Accepted:
        """Validate as the other method does, and that all entries are of the round's shared draw.

        Raises:
            RefusedUpdate: the reply or its positions are invalid.
        """
        accepted = self._inner.accept(node, reply, packed, global_model)
        check_positions(accepted.contribution.unpack(), self._positions(global_model))
        return accepted

    def combine(self, accepted: Sequence[Accepted], global_model: GlobalModel) -> Mapping[Unit, Tensor]:
        """Mean of the clipped updates with noise, times ``server-learning-rate``, at the shared positions.

        The standard deviation of an entry's noise is ``dp-noise-multiplier * dp-clip-norm`` over the number of clients
        of a round, times the learning rate.
        """
        positions = self._positions(global_model)
        sums = clipped_sum(
            (each.contribution for each in accepted), positions, clip_norm=self._keys.dp_clip_norm
        )
        noisy = self._noise.noisy(
            {unit_name(unit): total for unit, total in sums.items()},
            deviation=self._keys.dp_noise_multiplier * self._keys.dp_clip_norm,
            purpose="update",
            server_round=global_model.version + 1,
        )
        clients = self._config.participation.wanted(self._config.num_clients)
        factor = self._config.server_learning_rate / clients
        sizes = unit_sizes(global_model.model, attention=self._config.attention_lora)
        return {
            unit: _dense(sizes[unit], positions[unit], factor * total)
            for unit, total in ((parse_unit(name), total) for name, total in noisy.items())
        }

    def combine_usage(self, accepted: Sequence[Accepted], global_model: GlobalModel) -> list[np.ndarray]:
        """Sum of the clients' usage counts of equal norm, with noise on every pair; none without ``dp-usage-noise``."""
        if not self._keys.counts_usage:
            return []
        sums = unit_norm_sum([each.usage for each in accepted])
        noisy = self._noise.noisy(
            {str(layer): total for layer, total in enumerate(sums)},
            deviation=self._keys.dp_usage_noise,
            purpose="usage",
            server_round=global_model.version + 1,
        )
        return [_USAGE_NORM * np.triu(total).clip(min=0) for total in noisy.values()]

    def after_round(self, global_model: GlobalModel, state: FederationState) -> RewireRecord | None:
        """Edit the graph as the other method does, by usage with noise."""
        return self._inner.after_round(global_model, state)

    def _positions(self, global_model: GlobalModel) -> Positions:
        """Shared positions of the current round, drawn once."""
        server_round = global_model.version + 1
        if self._draw[0] != server_round:
            config = self._config
            spans = trained_spans(global_model.model, config.train, attention=config.attention_lora)
            draw = SharedEntries(config.seed, server_round, spans)
            self._draw = server_round, {unit: draw.positions(unit, config.density) for unit in spans}
        return self._draw[1]


def _dense(size: int, positions: np.ndarray, values: np.ndarray) -> Tensor:
    """Vector float32 ``[size]`` with ``values`` at ``positions`` and zero elsewhere."""
    vector = torch.zeros(size)
    vector[torch.from_numpy(positions)] = torch.from_numpy(values).float()
    return vector
