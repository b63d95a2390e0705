"""Selection of experts to remove by saliency rank, under protection, filters and a minimum per layer.

All numbers of experts are those of routed experts: shared experts, which every token visits, are neither removed nor
counted.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from configs.choices import Action, DomainMode, SafetyMode, Strategy, check_choice
from configs.errors import UserError
from configs.values import split_list
from experts.saliency.expert_map import ExpertMap
from experts.saliency.measures import Saliency
from experts.saliency.ranks import rank_sums
from experts.selection.expert_list import ExpertList

_MOST_EXPERTS = 2**16


@dataclass(frozen=True)
class SelectionRules:
    """Number of experts to remove, and the rules that exempt experts.

    Attributes:
        n_prune: number of experts to remove, per layer, or in all if ``model_wide``. ``analyze`` removes none.
        model_wide: whether experts are ranked and removed over all layers together.
        strategy: ``bottom``: worst ranks first. ``strided``: evenly spaced over the worse half of the removable experts
            (over more, if ``n_prune`` needs more), the worst included, the best expert of each layer exempt.
        action: ``analyze`` (ranks only), ``prune``, or ``merge`` (into experts that stay).
        min_rank: smallest rank sum of a removable expert.
        max_rank: largest rank sum of a removable expert.
        guard_top: percentage of each layer's routed experts that are exempt, those of the best ranks, rounded up.
        min_experts_per_layer: smallest number of routed experts that a layer keeps.
        ignored: expert ids exempt in every layer.
        safety: experts that are exempt (``safety_mode`` ``protect``) or removed first, in order of rank (``target``).
        safety_mode: ``protect`` or ``target``.
        domain: exempt experts.
        domain_mode: ``protect``.
    """

    n_prune: int = 0
    model_wide: bool = False
    strategy: str = "bottom"
    action: str = "prune"
    min_rank: float | None = None
    max_rank: float | None = None
    guard_top: float = 0.0
    min_experts_per_layer: int = 1
    ignored: frozenset[int] = frozenset()
    safety: ExpertMap | None = None
    safety_mode: str = "protect"
    domain: ExpertMap | None = None
    domain_mode: str = "protect"

    def __post_init__(self):
        check_choice("`strategy`", self.strategy, Strategy)
        check_choice("`action`", self.action, Action)
        check_choice("`safety_mode`", self.safety_mode, SafetyMode)
        check_choice("`domain_mode`", self.domain_mode, DomainMode)
        _check_at_least("n_prune", self.n_prune, 0)
        _check_at_least("min_experts_per_layer", self.min_experts_per_layer, 1)
        if not 0 <= self.guard_top <= 100:
            raise UserError(f"expected `guard_top` to be a percentage from 0 to 100, got {self.guard_top}")
        low, high = self.min_rank, self.max_rank
        if low is not None and high is not None and not low <= high:
            raise UserError(f"expected `min_rank` to be at most `max_rank`, got {low} and {high}")
        if self.safety_mode == "target" and self.safety is None:
            raise UserError(
                "expected `safety_map` with `safety_mode` target, got none; name the map to target"
            )
        for kind in ("safety", "domain"):
            given = getattr(self, kind)
            if given is not None and given.kind != kind:
                raise UserError(f"expected a map of kind {kind} as `{kind}_map`, got one of {given.kind}")


def parse_expert_ids(text: str) -> frozenset[int]:
    """Parse expert ids such as ``1,2,250..255``; a range includes its end.

    Raises:
        UserError: malformed text, or an id above 65535.
    """
    ids: set[int] = set()
    for part in split_list(text, ","):
        first, dots, last = part.partition("..")
        ends = [end.strip() for end in ((first, last) if dots else (first, first))]
        if not all(end.isdecimal() and len(end) < 6 and int(end) < _MOST_EXPERTS for end in ends) or int(
            ends[0]
        ) > int(ends[1]):
            raise UserError(f"expected expert ids such as 1,2,250..255, got {part!r} in {text!r}")
        ids.update(range(int(ends[0]), int(ends[1]) + 1))
    return frozenset(ids)


def select_experts(
    saliencies: Sequence[Saliency], metric: str, selection: SelectionRules, *, files: Sequence[str] = ()
) -> ExpertList:
    """Rank experts and select those to remove.

    Args:
        saliencies: saliencies of one model on one or several texts; their ranks are summed.
        metric: one of ``configs.choices.Metric``.
        selection: number of experts to remove, and exemptions.
        files: names of the saliency files, recorded as the source.

    Raises:
        UserError: as ``rank_sums``; a map or an ignored expert of another model; ``n_prune`` above the number of
            removable experts, which the message names.
    """
    ranks = rank_sums(saliencies, metric, model_wide=selection.model_wide)
    _check_fit(saliencies[0], selection)
    actions = np.where(np.isnan(ranks), "", "keep").astype("<U5")
    if selection.action != "analyze":
        for layer, expert in _chosen(ranks, saliencies[0].routed, selection):
            actions[layer, expert] = selection.action
    source = {
        "files": list(files),
        "metric": metric,
        "selection_mode": "model_wide" if selection.model_wide else "per_layer",
        "action_mode": selection.action,
    }
    filters = {name: getattr(selection, name) for name in ("min_rank", "max_rank", "n_prune")}
    if selection.guard_top:
        filters["guard_top"] = selection.guard_top
    return ExpertList(ranks, actions, source, filters)


def _chosen(ranks: np.ndarray, routed: np.ndarray, selection: SelectionRules) -> list[tuple[int, int]]:
    """Layer and expert of each selected expert."""
    may_go = _removable(ranks, routed, selection)
    groups = {"in the whole model": may_go}
    if not selection.model_wide:
        groups = {
            f"in layer {layer}": [pair for pair in may_go if pair[0] == layer] for layer in range(len(ranks))
        }
    where, tightest = min(groups.items(), key=lambda group: len(group[1]))
    if selection.n_prune > len(tightest):
        raise UserError(
            f"expected to remove at most {len(tightest)} experts {where}, got `n_prune` {selection.n_prune}; "
            "shared, protected, guarded and ignored experts, those outside the rank filter, the best of a layer if "
            f"strided, and {selection.min_experts_per_layer} per layer stay: lower `n_prune` or loosen those"
        )
    targets = _targets(ranks.shape, selection)
    return [pair for group in groups.values() for pair in _take(group, selection, targets)]


def _take(
    may_go: list[tuple[int, int]], selection: SelectionRules, targets: np.ndarray
) -> list[tuple[int, int]]:
    """Select ``n_prune`` experts of the removal queue by the strategy."""
    if selection.strategy == "bottom":
        return may_go[: selection.n_prune]
    first = [pair for pair in may_go if targets[pair]][: selection.n_prune]
    rest = [pair for pair in may_go if not targets[pair]]
    return first + strided(rest, selection.n_prune - len(first))


def strided(worst_first: list, number: int) -> list:
    """``number`` evenly spaced items of the first half of the list, or of more if needed; the first is included."""
    window = max(-(-len(worst_first) // 2), number)
    return [worst_first[index * window // number] for index in range(number)]


def _removable(ranks: np.ndarray, routed: np.ndarray, selection: SelectionRules) -> list[tuple[int, int]]:
    """Removal queue: targets first, then from worst to best; every prefix keeps the minimum per layer.

    Ties are resolved by the higher expert number, then by the later layer.
    """
    candidates = free_experts(ranks, routed, selection)
    layers, experts = np.nonzero(candidates)
    targets = _targets(ranks.shape, selection)[layers, experts]
    order = np.lexsort((-layers, -experts, -ranks[layers, experts], ~targets))
    room = routed.sum(axis=1) - selection.min_experts_per_layer
    removable = []
    for layer, expert in zip(layers[order].tolist(), experts[order].tolist(), strict=True):
        if room[layer] > 0:
            room[layer] -= 1
            removable.append((layer, expert))
    return removable


def free_experts(ranks: np.ndarray, routed: np.ndarray, selection: SelectionRules) -> np.ndarray:
    """Routed experts (of bool ``[L, E]``) that no rule exempts, bool ``[L, E]``."""
    candidates = routed.copy()
    if selection.min_rank is not None:
        candidates &= ranks >= selection.min_rank
    if selection.max_rank is not None:
        candidates &= ranks <= selection.max_rank
    candidates &= ~_guarded(ranks, routed, selection.guard_top)
    candidates[:, sorted(selection.ignored)] = False
    if selection.safety is not None and selection.safety_mode == "protect":
        candidates &= ~selection.safety.mask
    if selection.domain is not None:
        candidates &= ~selection.domain.mask
    if selection.strategy == "strided":
        candidates[np.arange(len(ranks)), np.where(routed, ranks, np.inf).argmin(axis=1)] = False
    return candidates


def _guarded(ranks: np.ndarray, routed: np.ndarray, percentage: float) -> np.ndarray:
    """Best ``percentage`` of the routed experts of each layer, rounded up, bool ``[L, E]``; of ties the first."""
    numbers = np.ceil(routed.sum(axis=1, keepdims=True) * percentage / 100)
    order = np.where(routed, ranks, np.inf).argsort(axis=1, kind="stable")
    return routed & (order.argsort(axis=1) < numbers)


def _targets(shape: tuple[int, ...], selection: SelectionRules) -> np.ndarray:
    if selection.safety is not None and selection.safety_mode == "target":
        return selection.safety.mask
    return np.zeros(shape, dtype=bool)


def _check_fit(saliency: Saliency, selection: SelectionRules) -> None:
    """Refuse maps and expert ids of another model."""
    beyond = [expert for expert in sorted(selection.ignored) if not 0 <= expert < saliency.num_experts]
    if beyond:
        raise UserError(
            f"expected `ignore_experts` to name experts 0 to {saliency.num_experts - 1}, got {beyond[0]}"
        )
    for given in (selection.safety, selection.domain):
        if given is None:
            continue
        prints = [part.provenance.get("model_fingerprint") for part in (saliency, given)]
        if given.experts_per_layer != saliency.experts_per_layer or (
            None not in prints and len(set(prints)) > 1
        ):
            raise UserError(
                f"expected a {given.kind} map of the model that the saliency is of, got one of another "
                f"({given.experts_per_layer} experts per layer against {saliency.experts_per_layer}); scan this model"
            )


def _check_at_least(field: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"expected `{field}` of at least {least}, got {value}")
