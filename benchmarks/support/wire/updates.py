"""Updates for the codec benchmark: expert changes of real local training, and random masks."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor

from benchmarks.support.material import bootstrapped, data_sources, domain_blocks, model_path
from clients.training.trainer import LocalTraining, train_locally
from federated.data.blocks import Blocks, batches
from federated.selection.entries import largest_share, sparsify
from federated.updates.update import SparseUpdate, SparseVector, Unit
from federated.wire.quantize import quantize_update
from models.graph.unit_vectors import read_unit, unit_sizes, weight_count
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

_BATCH = 8


@dataclass(frozen=True)
class TrainingSettings:
    """Local training of one client per domain.

    Attributes:
        domains: domain of each client.
        experts: E of each layer.
        blocks: text blocks per client.
        block_size: tokens per block.
        calibration_tokens: tokens sampled from the model for the bootstrap.
        training: local training of a round.
    """

    domains: Sequence[str]
    experts: int
    blocks: int
    block_size: int
    calibration_tokens: int
    training: LocalTraining


@dataclass(frozen=True)
class TrainedUpdates:
    """Expert changes of local training.

    Attributes:
        changes: change ``[size]`` of every expert, fp32, per client.
        carried: change of the first client in a second round plus the error-feedback residual of the first round.
        hidden_size: d; the first ``3hd`` entries of a change are a matrix ``[3h, d]``.
        weights: ``3hd``.
    """

    changes: list[dict[Unit, Tensor]]
    carried: dict[Unit, Tensor]
    hidden_size: int
    weights: int

    def matrices(self, units: Mapping[Unit, Tensor], every: int) -> list[Tensor]:
        """Weight change ``[3h, d]`` of one in ``every`` experts, without routing parameters."""
        return [units[unit][: self.weights].view(-1, self.hidden_size) for unit in sorted(units)[::every]]


def trained_updates(settings: TrainingSettings, *, quick: bool, density: float, bits: int) -> TrainedUpdates:
    """Train one client per domain from the same graph, the first one for a second round.

    Args:
        settings: clients, graph and training.
        quick: use the embedded model and WikiMix.
        density: share of entries that the first client's first update ships.
        bits: bits per value of that update.
    """
    path = model_path("mix7M", quick=quick)
    model = bootstrapped(path, settings.experts, settings.calibration_tokens)
    texts = [
        domain_blocks(source, path, block_size=settings.block_size, max_blocks=settings.blocks)
        for source in data_sources(settings.domains, quick=quick)
    ]
    changes = [_change(model, text, settings.training, seed=1) for text in texts]
    left = _left(changes[0], density, bits)
    again = _change(model, texts[0], settings.training, seed=2)
    layer = model.expert_layers()[0]
    carried = {unit: left[unit] + again[unit] for unit in left}
    return TrainedUpdates(changes, carried, layer.hidden_size, weight_count(layer))


def _change(
    model: FedGraftForCausalLM, text: Blocks, training: LocalTraining, *, seed: int
) -> dict[Unit, Tensor]:
    client = copy.deepcopy(model)
    train_locally(client, batches(text, _BATCH, generator=torch.Generator().manual_seed(seed)), training)
    return {unit: read_unit(client, unit) - read_unit(model, unit) for unit in unit_sizes(model)}


def _left(change: Mapping[Unit, Tensor], density: float, bits: int) -> dict[Unit, Tensor]:
    """Error-feedback residual: the change minus its shipped, quantized largest entries."""
    shipped = quantize_update(kept(change, density), bits).vectors
    return {unit: vector - torch.from_numpy(shipped[unit].to_dense()) for unit, vector in change.items()}


def side_by_side(changes: Sequence[Mapping[Unit, Tensor]]) -> dict[Unit, Tensor]:
    """Units of several clients, renumbered as layers of one larger model."""
    layers = 1 + max(layer for layer, _ in changes[0])
    return {
        (layers * client + layer, expert): vector
        for client, units in enumerate(changes)
        for (layer, expert), vector in units.items()
    }


def kept(vectors: Mapping[Unit, Tensor], density: float, *, shared: bool = False) -> SparseUpdate:
    """Largest entries of ``vectors``: a share ``density`` of each unit or, if ``shared``, of all units together."""
    if shared:
        return SparseUpdate(0, "", largest_share(vectors, vectors, density))
    return SparseUpdate(0, "", {unit: sparsify(vector, density) for unit, vector in vectors.items()})


def random_update(entries: int, density: float, *, seed: int, unit_size: int = 50_000) -> SparseUpdate:
    """Update with normal values at uniformly random positions, in units of at least ``entries`` entries together."""
    rng = np.random.default_rng(seed)
    vectors = {}
    for expert in range(-(-entries // unit_size)):
        indices = np.flatnonzero(rng.random(unit_size) < density)
        vectors[(0, expert)] = SparseVector(unit_size, indices, rng.standard_normal(indices.size) * 1e-3)
    return SparseUpdate(0, "", vectors)
