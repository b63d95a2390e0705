"""Plan of the experts layer by layer: each layer is fitted to the inputs that the compressed layers before it produce.

Shape suffixes: T tokens, D hidden width, M neurons of the FFN, E experts, H neurons per expert, R rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import replace
from itertools import chain

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.choices import Features
from experts.clustering import Clusters, timed_clusters
from experts.graph.expert_graph import edges_by_lift
from models.bootstrap.calibration import hidden_activations
from models.bootstrap.layer_stream import LayerStream
from models.bootstrap.neuron_features import experts_of_neurons, neuron_features
from models.bootstrap.plan import BootstrapOptions, LayerExperts
from models.bootstrap.ridge import Moments, low_rank_ridge, solve_ridge
from models.bootstrap.router_init import visited_experts
from models.runtime.memory import return_freed_memory

# Tokens of an activation profile for k-means.
_PROFILE_TOKENS = 1024
# Tokens whose activations are computed at once.
_ROWS = 1024


@torch.no_grad()
def plan_layer_by_layer(
    model: PreTrainedModel,
    input_ids: Tensor,
    options: BootstrapOptions,
    *,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> list[LayerExperts]:
    """Choose shared neurons, cluster the others, fit router and default output, one layer after the other.

    Shared experts hold the neurons of largest root mean square contribution (as in CMoE, arXiv:2502.04416). Errors of
    compressed layers reach the layers behind them, whose routers and default outputs are fitted to these inputs.

    Args:
        model: a dense Llama.
        input_ids: calibration text, ``[N, S]``.
        options: options of the bootstrap.
        on_layer: called with the index of each layer that is done.
    """
    stream, planned = LayerStream(model, input_ids), []
    for index, layer in enumerate(model.model.layers):
        x_TD = stream.ffn_input(index)
        plan, output_TD = _plan_layer(layer.mlp, x_TD, options)
        planned.append(plan)
        stream.add(output_TD)
        del x_TD, output_TD
        return_freed_memory()
        on_layer(index)
    return planned


def _plan_layer(mlp: nn.Module, x_TD: Tensor, options: BootstrapOptions) -> tuple[LayerExperts, Tensor]:
    """Plan of one layer, and the output ``[T, D]`` of the layer with its k experts per token."""
    hidden_TM = _by_rows(lambda rows: hidden_activations(mlp, x_TD[rows]), len(x_TD))
    norm_M = mlp.down_proj.weight.float().norm(dim=0)
    size_M = torch.linalg.vector_norm(hidden_TM, dim=0, dtype=torch.float32) * norm_M
    clusters, seconds = _members(mlp, x_TD, hidden_TM, size_M, options)
    members = torch.from_numpy(clusters.members)
    moments = Moments.of_features(x_TD, x_TD.shape[1])
    router = contribution_router(x_TD, _sizes(hidden_TM, norm_M, members), moments.gram_FF)
    visited_TE = visited_experts(x_TD, router, options.visits, options.num_shared)
    output_TD = _outputs(mlp, x_TD, hidden_TM, visited_TE, experts_of_neurons(members), moments)
    default = _default_output(moments, options)
    if default is not None:
        down, up, bias = default
        for rows in _slices(len(x_TD)):
            estimate_TD = (x_TD[rows].float() @ down.T @ up.T + bias) * _unvisited(options)
            output_TD[rows] += estimate_TD.to(output_TD)
    edges = _routed_edges(visited_TE, options)
    return LayerExperts(clusters, router, edges, seconds, options.num_shared, default), output_TD


def _unvisited(options: BootstrapOptions) -> float:
    """Share of the experts that a token does not visit."""
    return 1 - options.visits / options.num_experts


def _default_output(moments: Moments, options: BootstrapOptions) -> tuple[Tensor, Tensor, Tensor] | None:
    """Parameters of ``DefaultOutput`` that predict the outputs of unvisited experts; None without one."""
    if not options.default_rank or options.visits == options.num_experts:
        return None
    down, up, bias = low_rank_ridge(moments, options.default_rank)
    return down, up / _unvisited(options), bias / _unvisited(options)


def _slices(tokens: int) -> Iterator[slice]:
    """Slices of ``_ROWS`` tokens, whose intermediate values stay small."""
    return (slice(start, min(start + _ROWS, tokens)) for start in range(0, tokens, _ROWS))


def _by_rows(compute: Callable[[slice], Tensor], tokens: int) -> Tensor:
    """Concatenation of ``compute(rows)`` over ``_slices``."""
    parts = (compute(rows) for rows in _slices(tokens))
    first = next(parts)
    whole, done = first.new_empty(tokens, *first.shape[1:]), 0
    for part in chain([first], parts):
        whole[done : done + len(part)] = part
        done += len(part)
    return whole


def _sizes(hidden_TM: Tensor, norm_M: Tensor, members_EH: Tensor) -> Tensor:
    """Root of the summed squared contributions of each expert's neurons, ``[T, E]`` fp32."""

    def sizes(rows: slice) -> Tensor:
        squared_TM = (hidden_TM[rows].float() * norm_M).square()
        return squared_TM[:, members_EH.flatten()].unflatten(1, members_EH.shape).sum(-1).sqrt()

    return _by_rows(sizes, len(hidden_TM))


def _outputs(
    mlp: nn.Module, x_TD: Tensor, hidden_TM: Tensor, visited_TE: Tensor, expert_M: Tensor, moments: Moments
) -> Tensor:
    """Outputs ``[T, D]`` of the visited experts of each token; those of the others are added to ``moments``."""

    def outputs(rows: slice) -> Tensor:
        kept_TM = hidden_TM[rows] * visited_TE[rows][:, expert_M]
        moments.add_targets(x_TD[rows], mlp.down_proj(hidden_TM[rows] - kept_TM))
        return mlp.down_proj(kept_TM)

    return _by_rows(outputs, len(hidden_TM))


def _members(
    mlp: nn.Module, x_TD: Tensor, hidden_TM: Tensor, size_M: Tensor, options: BootstrapOptions
) -> tuple[Clusters, float]:
    """Neurons of each expert, shared experts first, and the seconds of the clustering."""
    width = len(size_M) // options.num_experts
    order = size_M.argsort(descending=True, stable=True).cpu().numpy()
    shared, others = np.split(order, [options.num_shared * width])
    others = np.sort(others)
    generator = torch.Generator().manual_seed(options.seed)
    tokens = torch.randperm(len(x_TD), generator=generator)[:_PROFILE_TOKENS]
    profile = hidden_TM[tokens].T
    if options.features == Features.GATE_ACTIVATION:
        profile = mlp.act_fn(mlp.gate_proj(x_TD[tokens])).T
    rows = neuron_features(mlp, options.features, profile)[others]
    routed = options.num_experts - options.num_shared
    clusters, seconds = timed_clusters(rows, routed, options.seed, options.clustering)
    members = others[clusters.members]
    members = members[np.argsort(-size_M.cpu().numpy()[members].mean(axis=1), kind="stable")]
    return replace(clusters, members=np.concatenate([shared.reshape(-1, width), members])), seconds


def contribution_router(x_TD: Tensor, sizes_TE: Tensor, gram_DD: Tensor) -> Tensor:
    """Router weight ``[E, D]``, fp32: ridge regression from the input to each expert's contribution.

    Args:
        x_TD: FFN input.
        sizes_TE: size of each expert's contribution to the output.
        gram_DD: Gram matrix of ``x_TD``, fp64.

    Returns:
        Weights whose targets are the sizes relative to their mean over experts, which no ranking depends on.
    """
    target_TE = sizes_TE / sizes_TE.mean().clamp(min=1e-30)
    target_TE -= target_TE.mean(-1, keepdim=True)
    moment_DE = x_TD.float().T @ target_TE
    return solve_ridge(gram_DD, moment_DE.double()).T.contiguous()


def _routed_edges(visited_TE: Tensor, options: BootstrapOptions) -> np.ndarray:
    """Edge mask ``[E, E]``: all roots, and edges by lift between routed experts; shared ones have none."""
    mask = np.eye(options.num_experts, dtype=bool)
    routed = visited_TE[:, options.num_shared :].cpu().numpy()
    mask[options.num_shared :, options.num_shared :] = edges_by_lift(routed, options.edges_per_expert)
    return mask
