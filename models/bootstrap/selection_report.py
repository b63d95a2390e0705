"""Perplexity before training of the router and of baseline selections, at several shares of active experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from experts.clustering import random_clusters
from models.bootstrap.build import LayerExperts, fit_routers
from models.bootstrap.calibration import Calibration, hidden_activations
from models.bootstrap.neuron_features import experts_of_neurons
from models.bootstrap.router_init import centroid_router, expert_contributions
from models.graph.runtime_settings import visiting
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.runtime.perplexity import LossSum, evaluate_loss

SHARES = (75, 50, 25)
BASELINES = ("centroid", "static", "oracle", "random")

Score = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class NeuronSelection:
    """Top-k selection of groups of neurons in every layer of a dense model.

    Attributes:
        members: per layer ``[E, H]``, the neurons of each group.
        scores: per layer, map from the FFN and its input ``[T, D]`` to scores ``[T, E]``; the top k are active.
    """

    members: list[Tensor]
    scores: list[Score]


def baseline_perplexities(
    measured: Calibration,
    experts: Sequence[LayerExperts],
    held_out: tuple[Tensor, Tensor],
    *,
    names: Sequence[str] = BASELINES,
    on_step: Callable[[], None] = lambda: None,
) -> dict:
    """Held-out perplexity of the dense model and of baseline selections of its neurons.

    ``centroid`` routes by mean gate rows; ``static`` always keeps the neurons of largest mean contribution; ``oracle``
    ranks experts by their actual contribution to the token; ``random`` routes by ridge among random experts.

    Args:
        measured: dense model, and its statistics on calibration text, to which the baselines are fitted.
        experts: experts whose neurons ``centroid`` and ``oracle`` select.
        held_out: ``input_ids`` and ``labels``, each ``[N, S]``.
        names: baselines to evaluate, of ``BASELINES``.
        on_step: called after each of the ``1 + len(names) * len(SHARES)`` evaluations.

    Returns:
        ``{"dense": float, "75": {"centroid", "static", "oracle", "random"}, "50": ..., "25": ...}``.
    """
    dense = measured.model
    selections = baselines(measured, [torch.from_numpy(layer.clusters.members) for layer in experts], names)
    report: dict = {"dense": evaluate_loss(dense, *held_out).perplexity}
    on_step()
    for share in SHARES:
        report[str(share)] = {}
        for name, selection in selections.items():
            with select_neurons(dense, selection, share):
                report[str(share)][name] = evaluate_loss(dense, *held_out).perplexity
            on_step()
    return report


def add_router_perplexities(
    report: dict,
    graph: FedGraftForCausalLM,
    held_out: tuple[Tensor, Tensor],
    *,
    on_step: Callable[[], None] = lambda: None,
) -> None:
    """Add the held-out perplexity of the graph's router as the first column of every share.

    Args:
        report: as ``baseline_perplexities`` returns it; changed in place.
        graph: graph with all roots open and zero affinities, so that its walk is a top-k.
        held_out: ``input_ids`` and ``labels``, each ``[N, S]``.
        on_step: called after each of the ``len(SHARES)`` evaluations.
    """
    for share in SHARES:
        report[str(share)] = {"router": _graph_loss(graph, share, held_out).perplexity, **report[str(share)]}
        on_step()


@contextmanager
def select_neurons(dense: PreTrainedModel, selection: NeuronSelection, share: int) -> Iterator[None]:
    """Context in which each token uses only its top ``share`` percent of the groups of ``selection``."""
    layers = [layer.mlp for layer in dense.model.layers]
    try:
        for mlp, members, score in zip(layers, selection.members, selection.scores, strict=True):
            mlp.forward = _masked_forward(mlp, members, score, active_count(len(members), share))
        yield
    finally:
        for mlp in layers:
            mlp.__dict__.pop("forward", None)


def active_count(num_experts: int, share: int) -> int:
    """Number of experts in ``share`` percent of ``num_experts``, at least one."""
    return max(1, round(num_experts * share / 100))


def _masked_forward(mlp: nn.Module, members: Tensor, score: Score, active: int) -> Callable[[Tensor], Tensor]:
    expert_of_neuron = experts_of_neurons(members)

    def forward(hidden_states: Tensor) -> Tensor:
        x_TD = hidden_states.flatten(0, -2)
        scores_TE = score(mlp, x_TD)
        kept_TE = torch.zeros_like(scores_TE).scatter(-1, scores_TE.topk(active, -1).indices, 1.0)
        hidden = hidden_activations(mlp, x_TD) * kept_TE[:, expert_of_neuron].to(x_TD.dtype)
        return mlp.down_proj(hidden).view_as(hidden_states)

    return forward


def _graph_loss(graph: FedGraftForCausalLM, share: int, held_out: tuple[Tensor, Tensor]) -> LossSum:
    visits = [active_count(layer.num_experts, share) for layer in graph.expert_layers()]
    with visiting(graph, visits):
        return evaluate_loss(graph, *held_out)


def baselines(
    measured: Calibration, members: Sequence[Tensor], names: Sequence[str] = BASELINES
) -> dict[str, NeuronSelection]:
    """Baselines ``names`` of ``baseline_perplexities`` by name; ``members`` is ``[E, H]`` per layer."""
    makers = {"centroid": _centroid, "static": _static, "oracle": _oracle, "random": _random}
    return {name: makers[name](measured, members) for name in names}


def _centroid(measured: Calibration, members: Sequence[Tensor]) -> NeuronSelection:
    layers = [layer.mlp for layer in measured.model.model.layers]
    routers = [centroid_router(mlp, rows) for mlp, rows in zip(layers, members, strict=True)]
    return linear_selection(members, routers)


def _static(measured: Calibration, members: Sequence[Tensor]) -> NeuronSelection:
    means = measured.statistics.mean_contribution
    return NeuronSelection(
        [torch.arange(len(mean))[:, None] for mean in means], [_constant(mean) for mean in means]
    )


def _oracle(measured: Calibration, members: Sequence[Tensor]) -> NeuronSelection:
    return NeuronSelection(list(members), [_contribution(rows) for rows in members])


def _random(measured: Calibration, members: Sequence[Tensor]) -> NeuronSelection:
    shuffled = [
        torch.from_numpy(random_clusters(rows.numel(), len(rows), seed=index))
        for index, rows in enumerate(members)
    ]
    return linear_selection(shuffled, fit_routers(measured, shuffled, "ridge"))


def linear_selection(members: Sequence[Tensor], routers: Sequence[Tensor]) -> NeuronSelection:
    """Selection by the logits of linear routers ``[E, D]``, one a layer."""
    return NeuronSelection(list(members), [_linear(weight) for weight in routers])


def _linear(weight_ED: Tensor) -> Score:
    return lambda mlp, x_TD: x_TD.float() @ weight_ED.T


def _constant(scores_E: Tensor) -> Score:
    return lambda mlp, x_TD: scores_E.expand(len(x_TD), -1)


def _contribution(members_EH: Tensor) -> Score:
    return lambda mlp, x_TD: expert_contributions(mlp, x_TD, members_EH)
