"""What hard gates cost before training: perplexity of every way to choose experts, at several active shares."""

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
from models.bootstrap.router_init import centroid_router, expert_contributions
from models.graph.runtime_settings import visiting
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.runtime.perplexity import LossSum, evaluate_loss

SHARES = (75, 50, 25)

Score = Callable[[nn.Module, Tensor], Tensor]


@dataclass(frozen=True)
class NeuronSelection:
    """A way to choose neurons in every layer of a dense model.

    Attributes:
        members: per layer ``[E, H]``.
        scores: per layer, from the FFN and its input ``[T, D]`` to scores ``[T, E]``; the best are kept.
    """

    members: list[Tensor]
    scores: list[Score]


def selection_report(
    dense: PreTrainedModel,
    graph: FedGraftForCausalLM,
    experts: Sequence[LayerExperts],
    calibration_ids: Tensor,
    held_out: tuple[Tensor, Tensor],
    *,
    measured: Calibration | None = None,
    on_step: Callable[[], None] = lambda: None,
) -> dict:
    """Held-out perplexity of the graph's router beside four other ways to choose as many neurons.

    ``static`` always keeps the neurons of largest mean contribution; ``oracle`` knows every expert's contribution to
    the token; ``random`` routes by ridge among experts drawn at random.

    Args:
        dense: the model that ``graph`` was made from.
        graph: all its experts are roots and its affinities zero, so that its walk is a top-k.
        experts: of ``graph``.
        calibration_ids: ``[N, S]``, to fit the baselines.
        held_out: ``input_ids`` and ``labels``, each ``[N, S]``.
        measured: of ``dense`` on ``calibration_ids``, where it was used before; None to measure here.
        on_step: called after each of the ``1 + 5 * len(SHARES)`` evaluations.

    Returns:
        ``{"dense": float, "75": {"router", "centroid", "static", "oracle", "random"}, "50": ..., "25": ...}``.
    """
    selections = baselines(
        measured or Calibration(dense, calibration_ids),
        [torch.from_numpy(layer.clusters.members) for layer in experts],
    )
    report: dict = {"dense": evaluate_loss(dense, *held_out).perplexity}
    on_step()
    for share in SHARES:
        report[str(share)] = {}
        for name, selection in {"router": None, **selections}.items():
            if selection is None:
                loss = _graph_loss(graph, share, held_out)
            else:
                with select_neurons(dense, selection, share):
                    loss = evaluate_loss(dense, *held_out)
            report[str(share)][name] = loss.perplexity
            on_step()
    return report


@contextmanager
def select_neurons(dense: PreTrainedModel, selection: NeuronSelection, share: int) -> Iterator[None]:
    """Let each token use only the best-scored experts of ``selection``, ``share`` percent of them."""
    layers = [layer.mlp for layer in dense.model.layers]
    try:
        for mlp, members, score in zip(layers, selection.members, selection.scores, strict=True):
            mlp.forward = _masked_forward(mlp, members, score, active_count(len(members), share))
        yield
    finally:
        for mlp in layers:
            mlp.__dict__.pop("forward", None)


def active_count(num_experts: int, share: int) -> int:
    """Experts that make up ``share`` percent of ``num_experts``, at least one."""
    return max(1, round(num_experts * share / 100))


def _masked_forward(mlp: nn.Module, members: Tensor, score: Score, active: int) -> Callable[[Tensor], Tensor]:
    expert_of_neuron = torch.empty(members.numel(), dtype=torch.int64)
    expert_of_neuron[members.flatten()] = torch.arange(len(members)).repeat_interleave(members.shape[1])

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


def baselines(measured: Calibration, members: Sequence[Tensor]) -> dict[str, NeuronSelection]:
    """The ways that ``selection_report`` compares a router with, by name; ``members`` is ``[E, H]`` per layer."""
    layers = [layer.mlp for layer in measured.model.model.layers]
    shuffled = [
        torch.from_numpy(random_clusters(rows.numel(), len(rows), seed=index))
        for index, rows in enumerate(members)
    ]
    means = measured.statistics.mean_contribution
    neurons = [torch.arange(len(mean))[:, None] for mean in means]
    centroids = [centroid_router(mlp, rows) for mlp, rows in zip(layers, members, strict=True)]
    random = fit_routers(measured, shuffled, "ridge")
    return {
        "centroid": linear_selection(members, centroids),
        "static": NeuronSelection(neurons, [_constant(mean) for mean in means]),
        "oracle": NeuronSelection(members, [_contribution(rows) for rows in members]),
        "random": linear_selection(shuffled, random),
    }


def linear_selection(members: Sequence[Tensor], routers: Sequence[Tensor]) -> NeuronSelection:
    """Select by routers ``[E, D]``, one a layer."""
    return NeuronSelection(list(members), [_linear(weight) for weight in routers])


def _linear(weight_ED: Tensor) -> Score:
    return lambda mlp, x_TD: x_TD.float() @ weight_ED.T


def _constant(scores_E: Tensor) -> Score:
    return lambda mlp, x_TD: scores_E.expand(len(x_TD), -1)


def _contribution(members_EH: Tensor) -> Score:
    return lambda mlp, x_TD: expert_contributions(mlp, x_TD, members_EH)
