"""Expert graph of a dense Llama: the same function, its FFN neurons partitioned into experts.

The construction follows EMoE (Qiu et al., 2023, arXiv:2310.10908); router and edges are FedGraft's own.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import replace

import numpy as np
import torch
from joblib import Parallel, cpu_count, delayed
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from configs.choices import RouterFit
from experts.clustering import Clusters, check_expert_count, timed_clusters
from experts.graph.expert_graph import edges_by_lift
from models.bootstrap.calibration import Calibration, NeuronStatistics, visit_ffn_inputs
from models.bootstrap.layer_by_layer import plan_layer_by_layer
from models.bootstrap.neuron_features import neuron_features
from models.bootstrap.plan import BootstrapOptions, LayerExperts
from models.bootstrap.router_init import centroid_router, ridge_routers, visited_experts
from models.checkpoints.save import cast_weights
from models.remote_code.configuration_fedgraft import FedGraftConfig
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM, init_expert_graph
from models.runtime.memory import return_freed_memory

# Fewest weights of a projection for which the clustering of a layer takes longer than the start of a process.
_PARALLEL_WEIGHTS = 16_000_000


def plan_experts(
    model: PreTrainedModel,
    input_ids: Tensor,
    options: BootstrapOptions,
    *,
    measured: Calibration | None = None,
    on_layer: Callable[[int], None] = lambda layer: None,
) -> list[LayerExperts]:
    """Cluster the neurons of each layer, order the experts, fit the routers, and choose the first edges.

    Args:
        model: a dense Llama.
        input_ids: calibration text, ``[N, S]``.
        options: options of the bootstrap.
        measured: statistics of this model on this text to share with other callers; None to measure here.
        on_layer: called with the index of each layer when its clustering is done.

    Raises:
        UserError: E does not divide the FFN width; weights that are not finite.
    """
    check_expert_count(model.config.intermediate_size, options.num_experts)
    if options.router == RouterFit.CONTRIBUTION:
        return plan_layer_by_layer(model, input_ids, options, on_layer=on_layer)
    measured = measured or Calibration(model, input_ids)
    clustered = _cluster_layers(measured, options, on_layer)
    members = [torch.from_numpy(clusters.members) for clusters, _ in clustered]
    routers = fit_routers(measured, members, options.router)
    edges = first_edges(model, input_ids, routers, options.visits, options.edges_per_expert)
    return [
        LayerExperts(clusters, router, mask, seconds)
        for (clusters, seconds), router, mask in zip(clustered, routers, edges, strict=True)
    ]


def _cluster_layers(
    measured: Calibration, options: BootstrapOptions, on_layer: Callable[[int], None]
) -> list[tuple[Clusters, float]]:
    """Ordered clusters of each layer and the seconds of their computation; several layers in parallel."""
    model, statistics = measured.model, measured.statistics
    features = (
        neuron_features(layer.mlp, options.features, profile)
        for layer, profile in zip(model.model.layers, statistics.profiles, strict=True)
    )
    timed = Parallel(n_jobs=options.jobs or _parallel_jobs(model), return_as="generator")(
        delayed(timed_clusters)(rows, options.num_experts, options.seed, options.clustering)
        for rows in features
    )
    clustered = []
    for index, (clusters, seconds) in enumerate(timed):
        clustered.append((order_by_activation(clusters, statistics, index), seconds))
        on_layer(index)
    return clustered


def fit_routers(measured: Calibration, members: Sequence[Tensor], kind: str) -> list[Tensor]:
    """Router weights ``[E, D]`` of every layer; ``kind`` is ``ridge`` or ``centroid``."""
    model = measured.model
    if kind == "ridge":
        return ridge_routers(model, measured.input_ids, members, metrics=measured.metrics)
    return [centroid_router(layer.mlp, rows) for layer, rows in zip(model.model.layers, members, strict=True)]


def first_edges(
    model: PreTrainedModel, input_ids: Tensor, routers: Sequence[Tensor], visits: int, edges_per_expert: int
) -> list[np.ndarray]:
    """Edge masks ``[E, E]`` of every layer by co-selection lift of the routers' top-k on the calibration text."""
    selected: list[list[Tensor]] = [[] for _ in routers]

    def visit(layer: int, x_TD: Tensor) -> None:
        selected[layer].append(visited_experts(x_TD, routers[layer].to(x_TD.device), visits).cpu())

    visit_ffn_inputs(model, input_ids, visit)
    return [edges_by_lift(torch.cat(parts).numpy(), edges_per_expert) for parts in selected]


def order_by_activation(clusters: Clusters, statistics: NeuronStatistics, layer: int) -> Clusters:
    """Sort the experts by descending mean activation, so that edges run from general to specialized experts."""
    mean = statistics.mean_activation[layer].numpy()[clusters.members].mean(axis=1)
    return replace(clusters, members=clusters.members[np.argsort(-mean, kind="stable")])


@torch.no_grad()
def build_graph(
    model: PreTrainedModel,
    experts: Sequence[LayerExperts],
    visits: int,
    *,
    base_fingerprint: str = "",
    consume: bool = False,
) -> FedGraftForCausalLM:
    """Build the expert graph from the weights of the dense ``model``, in its dtype.

    With every expert active its outputs equal those of ``model`` up to rounding.

    Args:
        model: a dense Llama.
        experts: plan of each layer.
        visits: k, experts per token.
        base_fingerprint: fingerprint of ``model`` for the recipe.
        consume: take the tensors of ``model`` outside its FFNs instead of copies, and remove each FFN when its weights
            are copied, so that memory holds one FFN twice; ``model`` cannot be used afterwards.
    """
    config = graph_config(model, [len(layer.edges) for layer in experts], visits)
    config.num_shared = [layer.num_shared for layer in experts]
    config.default_rank = len(experts[0].default[0]) if experts[0].default is not None else 0
    config.base_fingerprint = base_fingerprint
    graph = cast_weights(_empty_graph(config), model.dtype)
    graph.generation_config = copy.deepcopy(model.generation_config)
    rest = {name: value for name, value in model.state_dict().items() if ".mlp." not in name}
    graph.load_state_dict(rest, strict=False, assign=consume)
    graph.tie_weights()
    for target, source, planned in zip(graph.expert_layers(), model.model.layers, experts, strict=True):
        init_expert_graph(target, config.initializer_range)
        members = torch.from_numpy(planned.clusters.members)
        target.gate_up_proj.copy_(fuse_gate_up(source.mlp, members))
        target.down_proj.copy_(source.mlp.down_proj.weight.T[members].transpose(1, 2))
        target.router.weight.copy_(planned.router)
        target.edges.copy_(torch.from_numpy(planned.edges))
        target.neurons.copy_(members)
        if planned.default is not None:
            for parameter, value in zip(target.default.parameters(), planned.default, strict=True):
                parameter.copy_(value)
        if consume:
            source.mlp = None
            return_freed_memory()
    return graph.eval()


def _empty_graph(config: FedGraftConfig) -> FedGraftForCausalLM:
    """Graph of ``config`` whose weights have no values and take no memory yet."""
    with no_init_weights():
        return FedGraftForCausalLM(config)


def fuse_gate_up(mlp: nn.Module, members_EH: Tensor) -> Tensor:
    """Gate and up rows of each expert's neurons, ``[E, 2H, D]``."""
    return torch.cat([mlp.gate_proj.weight[members_EH], mlp.up_proj.weight[members_EH]], dim=1)


def graph_config(model: PreTrainedModel, num_experts: list[int], visits: int) -> FedGraftConfig:
    """Configuration of the graph: that of the dense ``model`` plus the expert counts and sizes."""
    inherited = model.config.to_dict()
    for key in ("model_type", "architectures", "auto_map", "transformers_version"):
        inherited.pop(key, None)
    return FedGraftConfig(
        **inherited,
        num_experts=num_experts,
        expert_size=model.config.intermediate_size // num_experts[0],
        experts_per_token=visits,
    )


def _parallel_jobs(model: PreTrainedModel) -> int:
    """Number of processes for the clustering; 1 for small layers, which take less time than the start of a process."""
    config = model.config
    if config.intermediate_size * config.hidden_size < _PARALLEL_WEIGHTS:
        return 1
    return min(cpu_count(), config.num_hidden_layers)
