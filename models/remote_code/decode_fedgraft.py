"""Decoding path: walk and weighted sum for one token, in Python numbers and vectors.

With one token the launch of a tensor operation takes longer than its computation, and the walk has dozens of them.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from math import inf

import torch
from torch import Tensor

from .routing_fedgraft import SHARED_SCORE, Walk


def walk_one_token(
    *,
    scores_E: Tensor,
    edges_EE: Tensor,
    affinity_EE: Tensor,
    resident_E: Tensor | None,
    num_visits: int,
    num_shared: int = 0,
) -> Walk:
    """Best-first ``walk_graph`` of one token without gradients; K of the result is ``min(num_visits, E)``."""
    scores, edges, affinity = scores_E.tolist(), edges_EE.tolist(), affinity_EE.tolist()
    if resident_E is not None:
        scores = [score if held else -inf for score, held in zip(scores, resident_E.tolist(), strict=True)]
    ranked = [SHARED_SCORE if score > -inf else score for score in scores[:num_shared]] + scores[num_shared:]
    now = [score if edges[expert][expert] else -inf for expert, score in enumerate(ranked)]
    bonus: dict[int, float] = {}
    made: dict[int, float] = {}
    for _ in range(min(num_visits, len(scores))):
        expert = max(range(len(now)), key=now.__getitem__)
        if now[expert] == -inf:
            break
        made[expert] = now[expert]
        now[expert] = -inf
        for child in range(expert + 1, len(scores)):
            if edges[expert][child] and child not in made and scores[child] > -inf:
                bonus[child] = max(bonus.get(child, -inf), affinity[expert][child])
                now[child] = ranked[child] + bonus[child]
    effective = [scores[expert] + bonus.get(expert, 0.0) for expert in made]
    return _as_walk(made, effective, edges, min(num_visits, len(scores)), scores_E)


def run_one_token(
    x_D: Tensor,
    weights: Sequence[float],
    experts: Sequence[int],
    passing: Sequence[Sequence[float]],
    run: Callable[[int, Tensor], Tensor],
) -> Tensor:
    """Weighted sum of the outputs of the visited experts for one token, ``[D]``.

    Args:
        x_D: input of the layer.
        weights: output weight of each visit.
        experts: visited experts; -1 for visits that are not made.
        passing: ``[E, E]``, gain of each edge that passes information, else 0.
        run: map from an expert and one row ``[1, D]`` to its output.
    """
    outputs: dict[int, Tensor] = {}
    result_D = torch.zeros_like(x_D)
    for expert, weight in sorted(zip(experts, weights, strict=True)):
        if expert < 0:
            continue
        row_D = x_D
        for source, output_D in outputs.items():
            if passing[source][expert]:
                row_D = torch.add(row_D, output_D, alpha=passing[source][expert])
        outputs[expert] = run(expert, row_D[None])[0]
        result_D.add_(outputs[expert], alpha=weight)
    return result_D


def _as_walk(
    made: dict[int, float], effective: list[float], edges: list[list[bool]], num_visits: int, scores_E: Tensor
) -> Walk:
    """Walk of one token from the selection scores and effective scores of its visits, in order of visit."""
    experts, parents = list(made), []
    for place, expert in enumerate(experts):
        earlier = [source for source in experts[:place] if source < expert and edges[source][expert]]
        parents.append(max(earlier, key=made.__getitem__, default=-1))
    unmade = num_visits - len(experts)
    rows = [experts + [-1] * unmade, parents + [-1] * unmade]
    integers = torch.tensor(rows, device=scores_E.device, dtype=torch.int64)
    values = torch.tensor([effective + [-inf] * unmade], device=scores_E.device, dtype=scores_E.dtype)
    return Walk(integers[:1], integers[1:], values)
