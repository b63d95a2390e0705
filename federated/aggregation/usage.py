"""Traversals of existing edges and demand for missing ones: token counts per pair of experts."""

from __future__ import annotations

import statistics
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from torch import Tensor

from experts.graph.expert_graph import ExpertGraph
from federated.aggregation.caps import untrusted
from federated.updates.update import RefusedUpdate
from federated.wire.columns import pack_column, unpack_column
from models.graph.runtime_settings import Observer, observing_walks
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.remote_code.routing_fedgraft import Walk

_WIDTH = 32  # bits of a count
# Demands of a layer that a client reports.
DEMANDS = 256


class UsageCounter:
    """Usage counts of one client, per layer int64 ``[E, E]``, upper-triangular.

    Diagonal: visits without a visited parent. An edge ``p -> q`` of the global graph: traversals. Any other pair
    ``p < q``: demand, i.e. tokens with both experts in the top-k of the raw router logits; none for shared and attached
    experts, which the router does not choose.

    Args:
        graph: global graph.
    """

    def __init__(self, graph: ExpertGraph) -> None:
        self._absent = [torch.from_numpy(~mask).triu(1) for mask in graph.masks]
        self._counts = [torch.zeros(mask.shape, dtype=torch.int64) for mask in graph.masks]

    @contextmanager
    def counting(self, model: FedGraftForCausalLM) -> Iterator[None]:
        """Add the counts of every forward pass of ``model`` within the block."""
        with observing_walks(model, self._observer):
            yield

    def counts(self) -> list[np.ndarray]:
        """The counts so far, per layer int64 ``[E, E]``."""
        return [count.numpy().copy() for count in self._counts]

    def largest_counts(self) -> list[np.ndarray]:
        """The counts so far, with zero in place of all demands but the ``DEMANDS`` largest of each layer.

        Edits need the largest demands only; among many experts, those of all pairs take more bytes than an update.
        """
        return [
            _largest_demands(count, absent) for count, absent in zip(self.counts(), self._absent, strict=True)
        ]

    def _observer(self, index: int) -> Observer:
        @torch.no_grad()
        def observe(layer: ExpertGraphMLP, scores_TE: Tensor, walk: Walk, weights_TK: Tensor) -> None:
            self._counts[index] += traversals(walk, layer.num_experts).cpu()
            wanted = demand(scores_TE, layer.num_visits, layer.num_shared, layer.attached).cpu()
            self._counts[index] += wanted * self._absent[index]

        return observe


def _largest_demands(count_EE: np.ndarray, absent_EE: Tensor) -> np.ndarray:
    absent = absent_EE.numpy()
    if absent.sum() <= DEMANDS:
        return count_EE
    demands = np.sort(count_EE[absent])[::-1]
    lowest = demands[DEMANDS - 1]
    # Pairs that tie with the last one are left out, so that no more than ``DEMANDS`` remain.
    least = lowest if demands[DEMANDS] < lowest else lowest + 1
    return np.where(absent & (count_EE < least), 0, count_EE)


def traversals(walk: Walk, num_experts: int) -> Tensor:
    """Visits per (credited parent, expert), int64 ``[E, E]``; visits without a parent are on the diagonal."""
    made = walk.experts_TK >= 0
    targets = walk.experts_TK[made]
    sources = torch.where(walk.parents_TK[made] < 0, targets, walk.parents_TK[made])
    return torch.bincount(sources * num_experts + targets, minlength=num_experts**2).view(num_experts, -1)


def demand(scores_TE: Tensor, top_k: int, num_shared: int = 0, attached: Sequence[int] = ()) -> Tensor:
    """Tokens with both p and q in the top-k of the raw router logits, int64 ``[E, E]``, for p < q only.

    The first ``num_shared`` of the k visits are those of shared experts; only the others are chosen by logits. Those
    of ``attached`` experts are not among the k.
    """
    if attached:
        scores_TE = scores_TE.clone()
        scores_TE[:, attached] = float("-inf")
    best = scores_TE[:, num_shared:].topk(max(top_k - num_shared, 0), -1).indices + num_shared
    chosen = torch.zeros_like(scores_TE).scatter(-1, best, 1.0)
    chosen[:, attached] = 0  # where fewer than k others are left
    return (chosen.T @ chosen).round().long().triu(1)


def combine_usage(clients: Sequence[Sequence[np.ndarray]]) -> list[np.ndarray]:
    """Sum of the clients' counts in which none of them decides alone, per layer float64 ``[E, E]``.

    Each client's layer is scaled to the same total, the lower median of all totals. Of three clients or more, the
    largest counts of a pair, from a fifth of the clients and at least one, are then reduced to the next largest: counts
    that as many clients forge weigh no more than what another one reports.

    Args:
        clients: per client and layer ``[E, E]``; at least one client.
    """
    return [_sum_of_bounded(np.stack(layer).astype(np.float64)) for layer in zip(*clients, strict=True)]


def _sum_of_bounded(counts_CEE: np.ndarray) -> np.ndarray:
    totals = counts_CEE.sum((1, 2))
    used = totals > 0
    if not used.any():
        return counts_CEE.sum(0)
    totals[~used] = 1.0
    counts_CEE *= (statistics.median_low(totals[used]) / totals)[:, None, None]
    largest = len(totals) - 1 - untrusted(len(totals))
    limit = np.partition(counts_CEE, largest, axis=0)[largest]
    return np.minimum(counts_CEE, limit).sum(0)


def pack_usage(counts: Sequence[np.ndarray]) -> bytes:
    """Pack the upper triangles of all layers, clipped to 32 bits, as one entropy-coded column."""
    columns = [count[np.triu_indices(len(count))] for count in counts]
    flat = np.concatenate(columns).clip(0, 2**32 - 1).astype(np.uint32)
    return pack_column(flat, width=_WIDTH)


def unpack_usage(data: bytes, num_experts: Sequence[int]) -> list[np.ndarray]:
    """Undo ``pack_usage``: per layer int64 ``[E, E]``.

    Raises:
        RefusedUpdate: the bytes are not such a column.
    """
    sizes = [count * (count + 1) // 2 for count in num_experts]
    flat = unpack_column(data, dtype=np.dtype(np.uint32), count=sum(sizes), width=_WIDTH)
    if len(flat) != sum(sizes):
        raise RefusedUpdate(f"expected {sum(sizes)} usage counts, got {len(flat)}")
    counts = []
    for experts, part in zip(num_experts, np.split(flat, np.cumsum(sizes)[:-1]), strict=True):
        count = np.zeros((experts, experts), dtype=np.int64)
        count[np.triu_indices(experts)] = part
        counts.append(count)
    return counts
