"""Reading and writing an expert graph as a Hugging Face checkpoint that carries its own modelling code."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from experts.clustering import Clusters
from experts.graph.expert_graph import ExpertGraph, check_reachable
from models.remote_code.configuration_fedgraft import FedGraftConfig
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


def save_graph(
    graph: FedGraftForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights, graph, configuration, modelling code and tokenizer into an existing directory.

    Args:
        graph: what is written.
        tokenizer: of the model.
        directory: receives the files.
        weights: those to write, by name; None for all that ``graph`` holds.
    """
    FedGraftConfig.register_for_auto_class()
    FedGraftForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    graph.save_pretrained(directory, state_dict=None if weights is None else dict(weights))
    tokenizer.save_pretrained(directory)


def cast_weights(model: FedGraftForCausalLM, dtype: torch.dtype) -> FedGraftForCausalLM:
    """Cast a model in place, except for what stays in fp32 whatever the dtype: routers and gains."""
    exact = tuple(model._keep_in_fp32_modules_strict)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if name.endswith(exact) else dtype)
    model.config.dtype = dtype
    return model


def read_graph(model: FedGraftForCausalLM) -> ExpertGraph:
    """The graph that a model holds, as plain data."""
    masks = tuple(layer.edges.cpu().numpy().copy() for layer in model.expert_layers())
    return ExpertGraph(masks, model.config.graph_version)


def check_graph(model: FedGraftForCausalLM) -> None:
    """Refuse a graph whose masks are not upper-triangular or leave an expert out of reach.

    Raises:
        UserError: names the layer.
    """
    for layer, mask in enumerate(read_graph(model).masks):
        check_reachable(mask, layer)


def write_graph(model: FedGraftForCausalLM, graph: ExpertGraph) -> None:
    """Give a model the masks and the version of ``graph``; gains of edges that are gone return to zero.

    An edge that comes back later starts again from zero.
    """
    with torch.no_grad():
        for layer, mask in zip(model.expert_layers(), graph.masks, strict=True):
            layer.edges.copy_(torch.from_numpy(mask))
            for values in (layer.edge_gain, layer.edge_affinity):
                values.mul_(layer.edges.triu(1))
    model.config.graph_version = graph.version


def cluster_table(clusters: Sequence[Clusters]) -> str:
    """``cluster_stats.txt``: neurons per expert, variance within and between, inertia, a line per layer."""
    lines = [
        f"{'layer':>5}  {'experts':>7}  {'neurons':>7}  {'within':>12}  {'between':>12}  {'inertia':>14}"
    ]
    for layer, each in enumerate(clusters):
        neurons = "/".join(str(size) for size in sorted(set(each.sizes)))
        lines.append(
            f"{layer:>5}  {len(each.sizes):>7}  {neurons:>7}  {each.variance_within:>12.6f}  "
            f"{each.variance_between:>12.6f}  {each.inertia:>14.4f}"
        )
    mean = np.mean([each.inertia for each in clusters])
    return "\n".join([*lines, f"mean inertia {mean:.4f}", ""])
