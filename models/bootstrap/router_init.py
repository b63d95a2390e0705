"""Router weights in closed form (gate-row centroids, ridge regression on elimination ranks), and their top-k."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.bootstrap.calibration import contributions, hidden_activations, visit_ffn_inputs
from models.bootstrap.fisher import output_metrics
from models.bootstrap.ridge import PENALTY, solve_ridge

# Most values of experts' outputs in memory at once, 64 MiB.
_OUTPUT_VALUES = 2**24


def expert_contributions(mlp: nn.Module, x_TD: Tensor, members_EH: Tensor) -> Tensor:
    """Contribution of each expert to the output, ``[T, E]``: the sum over its neurons of ``|h_i| * norm(w_down_i)``."""
    return contributions(mlp, x_TD)[:, members_EH].sum(-1)


def centroid_router(mlp: nn.Module, members_EH: Tensor) -> Tensor:
    """Mean gate row of each expert, ``[E, D]`` (EMoE's avg-k gating, arXiv:2310.10908)."""
    return mlp.gate_proj.weight.float()[members_EH].mean(1)


def ridge_routers(
    model: PreTrainedModel,
    input_ids: Tensor,
    members: Sequence[Tensor],
    *,
    metrics: Sequence[Tensor] | None = None,
    penalty: float = PENALTY,
) -> list[Tensor]:
    """Ridge regression from the FFN input to each expert's rank in a backward elimination of the experts.

    The targets are ``-sqrt(rank)``, rank 1 for the expert that is eliminated last (see ``elimination_places``). Ranks
    replace output norms because a router only ranks, and the norms of a few tokens are a hundred times those of the
    others. The square root gives more weight to differences between the first ranks.

    Args:
        model: a dense Llama.
        input_ids: calibration text, ``[N, S]``.
        members: per layer ``[E, H]``, the neurons of each expert.
        metrics: ``output_metrics`` of the model on this text; None to compute them.
        penalty: ridge penalty as a share of the mean squared input.

    Returns:
        Per layer ``[E, D]``, fp32: ``argmin_W sum_t |W x_t - c_t|^2 + penalty * tr(X'X)/D * |W|^2``, where the
        targets ``c`` are taken relative to their mean over experts, which no ranking depends on.
    """
    layers = [layer.mlp for layer in model.model.layers]
    factors = [metric_root(metric) for metric in metrics or output_metrics(model, input_ids)]
    width = model.config.hidden_size
    gram = [torch.zeros(width, width, dtype=torch.float64) for _ in layers]
    moment = [torch.zeros(width, len(rows), dtype=torch.float64) for rows in members]

    def visit(layer: int, x_TD: Tensor) -> None:
        target = -elimination_places(layers[layer], x_TD, members[layer], factors[layer]).sqrt()
        target = (target - target.mean(-1, keepdim=True)).double().cpu()
        x = x_TD.double().cpu()
        gram[layer] += x.T @ x
        moment[layer] += x.T @ target

    visit_ffn_inputs(model, input_ids, visit)
    return [solve_ridge(g, m, penalty).T.contiguous() for g, m in zip(gram, moment, strict=True)]


def elimination_places(mlp: nn.Module, x_TD: Tensor, members_EH: Tensor, root_DD: Tensor) -> Tensor:
    """Rank the experts of each token by backward elimination on the change of the layer's output.

    Each step eliminates the expert whose removal, together with those removed before, changes the output least; so two
    experts whose outputs cancel are eliminated one after the other.

    Args:
        mlp: FFN of width m.
        x_TD: its input, ``[T, D]``.
        members_EH: the neurons of each expert.
        root_DD: root of the metric; the size of a change ``d`` is ``|d @ root|``.

    Returns:
        Ranks, fp32 ``[T, E]``: from 1 for the expert eliminated last to E for the first one.
    """
    hidden_Tm = hidden_activations(mlp, x_TD).float()
    down_EHD = (mlp.down_proj.weight.float().T @ root_DD)[members_EH]
    # Few tokens at a time: the experts' outputs together are E times as large as the layer's.
    rows = max(1, _OUTPUT_VALUES // (len(members_EH) * x_TD.shape[1]))
    places = []
    for hidden in hidden_Tm.split(rows):
        outputs_TED = torch.einsum("teh,ehd->ted", hidden[:, members_EH], down_EHD)
        places.append(_places(outputs_TED @ outputs_TED.transpose(1, 2)))
    return torch.cat(places)


def _places(gram_TEE: Tensor) -> Tensor:
    """Ranks ``[T, E]`` of a backward elimination by the Gram matrices of the experts' outputs."""
    own_TE = gram_TEE.diagonal(dim1=1, dim2=2)
    # Inner product of each expert's output with the sum of the outputs eliminated so far.
    cross_TE, places_TE = torch.zeros_like(own_TE), torch.zeros_like(own_TE)
    for place in range(own_TE.shape[1], 0, -1):
        cost_TE = (own_TE + 2 * cross_TE).masked_fill(places_TE > 0, torch.inf)
        dropped_T1 = cost_TE.argmin(-1, keepdim=True)
        places_TE.scatter_(1, dropped_T1, float(place))
        cross_TE += gram_TEE.take_along_dim(dropped_T1[:, None], dim=1).squeeze(1)
    return places_TE


def metric_root(metric: Tensor) -> Tensor:
    """Cholesky factor ``R [D, D]`` of a metric, fp32: ``R R'`` is the metric."""
    return torch.linalg.cholesky(metric.double()).float()


def visited_experts(x_TD: Tensor, router_ED: Tensor, visits: int, num_shared: int = 0) -> Tensor:
    """Experts that each token visits, bool ``[T, E]``: the shared ones and the top ``visits - num_shared`` others."""
    logits_TE = x_TD.float() @ router_ED.T
    logits_TE[:, :num_shared] = torch.inf
    chosen = logits_TE.topk(visits, -1).indices
    return torch.zeros_like(logits_TE, dtype=torch.bool).scatter(-1, chosen, True)
