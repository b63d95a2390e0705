"""Plan of the experts layer by layer: each layer is fitted to the inputs that the compressed layers before it produce.

Shape suffixes: T tokens, D hidden width, M neurons of the FFN, E experts, H neurons per expert, R rank.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.choices import Features
from experts.clustering import Clusters, timed_clusters
from experts.graph.expert_graph import edges_by_lift
from models.bootstrap.calibration import hidden_activations, neuron_contributions
from models.bootstrap.layer_stream import LayerStream
from models.bootstrap.neuron_features import experts_of_neurons, neuron_features
from models.bootstrap.plan import BootstrapOptions, LayerExperts
from models.bootstrap.ridge import ridge
from models.bootstrap.router_init import visited_experts

# Tokens of an activation profile for k-means.
_PROFILE_TOKENS = 1024


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
        on_layer(index)
    return planned


def _plan_layer(mlp: nn.Module, x_TD: Tensor, options: BootstrapOptions) -> tuple[LayerExperts, Tensor]:
    """Plan of one layer, and the output ``[T, D]`` of the layer with its k experts per token."""
    hidden_TM = hidden_activations(mlp, x_TD)
    squared_TM = neuron_contributions(mlp, hidden_TM).square()
    clusters, seconds = _members(mlp, x_TD, hidden_TM, squared_TM.mean(0).sqrt(), options)
    members = torch.from_numpy(clusters.members)
    router = contribution_router(x_TD, squared_TM, members)
    del squared_TM
    visited_TE = visited_experts(x_TD, router, options.visits, options.num_shared)
    edges = _routed_edges(visited_TE, options)
    output_TD = mlp.down_proj(hidden_TM * visited_TE[:, experts_of_neurons(members)])
    default = None
    if options.default_rank and options.visits < options.num_experts:
        missing_TD = mlp.down_proj(hidden_TM) - output_TD
        share = 1 - options.visits / options.num_experts
        default = default_output(x_TD, missing_TD, options.default_rank, share)
        down, up, bias = default
        output_TD = output_TD + share * (x_TD @ down.T @ up.T + bias).to(output_TD)
    plan = LayerExperts(clusters, router, edges, seconds, options.num_shared, default)
    return plan, output_TD


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


def contribution_router(x_TD: Tensor, squared_TM: Tensor, members_EH: Tensor) -> Tensor:
    """Router weight ``[E, D]``, fp32: ridge regression from the input to each expert's contribution.

    Args:
        x_TD: FFN input.
        squared_TM: squared contribution of each neuron, ``(h_i * norm(w_down_i))^2``.
        members_EH: neurons of each expert.

    Returns:
        Weights whose targets are the root of the expert's summed squared contributions, relative to their mean over
        experts, which no ranking depends on.
    """
    target_TE = torch.stack([squared_TM[:, rows].sum(-1) for rows in members_EH], -1).sqrt()
    target_TE = target_TE / target_TE.mean().clamp(min=1e-30)
    return ridge(x_TD.float(), target_TE - target_TE.mean(-1, keepdim=True)).T.contiguous()


def default_output(
    x_TD: Tensor, missing_TD: Tensor, rank: int, share: float
) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced-rank ridge regression from the input to what the unvisited experts would have added.

    The affine ridge solution is projected onto the leading principal directions of its predictions (Izenman, 1975).

    Args:
        x_TD: FFN input.
        missing_TD: output of the unvisited experts.
        rank: R; at most D is used.
        share: share of the experts that are not visited; the result is for ``share`` = 1, see ``DefaultOutput``.

    Returns:
        ``down [R, D]``, ``up [D, R]`` and ``bias [D]``, fp32.
    """
    x, missing = x_TD.float(), missing_TD.float()
    mean, offset = x.mean(0), missing.mean(0)
    weight_DD = ridge(x - mean, missing - offset)
    predicted = (x - mean) @ weight_DD
    basis_DR = torch.linalg.eigh(predicted.T @ predicted)[1][:, -rank:]
    down, up = (weight_DD @ basis_DR).T.contiguous(), basis_DR / share
    return down, up.contiguous(), offset / share - up @ (down @ mean)


def _routed_edges(visited_TE: Tensor, options: BootstrapOptions) -> np.ndarray:
    """Edge mask ``[E, E]``: all roots, and edges by lift between routed experts; shared ones have none."""
    mask = np.eye(options.num_experts, dtype=bool)
    routed = visited_TE[:, options.num_shared :].cpu().numpy()
    mask[options.num_shared :, options.num_shared :] = edges_by_lift(routed, options.edges_per_expert)
    return mask
