"""Which experts go: the worst by rank, around those that are protected, ignored or filtered out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from configs.errors import UserError, nearest
from configs.values import split_list
from experts.saliency.expert_map import ExpertMap
from experts.saliency.measures import Saliency
from experts.saliency.ranks import rank_sums
from experts.selection.expert_list import ExpertList

STRATEGIES = ("bottom", "strided")
ACTION_MODES = ("analyze", "prune", "merge")
SAFETY_MODES = ("protect", "target")
DOMAIN_MODES = ("protect",)
_MOST_EXPERTS = 2**16


@dataclass(frozen=True)
class SelectionRules:
    """What may go, and how many.

    Attributes:
        n_prune: experts to remove: per layer, or in all if ``model_wide``. ``analyze`` removes none.
        model_wide: rank and remove over all layers together.
        strategy: ``bottom`` takes the worst. ``strided`` spreads over the worse half of what may go (over more, if
            ``n_prune`` needs more), always takes the worst, and never the best expert of a layer.
        action: ``analyze`` (ranks only), ``prune``, or ``merge``: removed experts are to go up into those that stay.
        min_rank: only experts of at least this rank sum may go; the others stay.
        max_rank: only experts of at most this rank sum may go; the others stay.
        min_experts_per_layer: experts that every layer keeps at least.
        ignored: expert ids that stay in every layer.
        safety: experts that ``safety_mode`` protects, or targets: they then go first, in order of rank.
        safety_mode: ``protect`` or ``target``.
        domain: experts that stay.
        domain_mode: ``protect``.
    """

    n_prune: int = 0
    model_wide: bool = False
    strategy: str = "bottom"
    action: str = "prune"
    min_rank: float | None = None
    max_rank: float | None = None
    min_experts_per_layer: int = 1
    ignored: frozenset[int] = frozenset()
    safety: ExpertMap | None = None
    safety_mode: str = "protect"
    domain: ExpertMap | None = None
    domain_mode: str = "protect"

    def __post_init__(self):
        _check_choice("--strategy", self.strategy, STRATEGIES)
        _check_choice("--action", self.action, ACTION_MODES)
        _check_choice("--safety-mode", self.safety_mode, SAFETY_MODES)
        _check_choice("--domain-mode", self.domain_mode, DOMAIN_MODES)
        _check_at_least("--n-prune", self.n_prune, 0)
        _check_at_least("--min-experts-per-layer", self.min_experts_per_layer, 1)
        low, high = self.min_rank, self.max_rank
        if low is not None and high is not None and not low <= high:
            raise UserError(f"expected --min-rank to be at most --max-rank, got {low} and {high}")
        if self.safety_mode == "target" and self.safety is None:
            raise UserError(
                "expected --safety-map with --safety-mode target, got none; name the map to target"
            )
        for kind in ("safety", "domain"):
            given = getattr(self, kind)
            if given is not None and given.kind != kind:
                raise UserError(f"expected a map of kind {kind} as --{kind}-map, got one of {given.kind}")


def parse_expert_ids(text: str) -> frozenset[int]:
    """Expert ids of a text such as ``1,2,250..255``; a range includes its end.

    Raises:
        UserError: anything else, or an id beyond any model.
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
    """Rank every expert and say which go.

    Args:
        saliencies: of one model, on one or several texts; their ranks are summed.
        metric: one of ``experts.saliency.measures.METRICS``.
        selection: what may go, and how many.
        files: names of the saliency files, recorded as the source.

    Raises:
        UserError: as ``rank_sums``; a map or an ignored expert of another model; ``n_prune`` beyond what protection,
            the ignored experts, the rank filter and the minimum per layer leave (how many are possible is said).
    """
    ranks = rank_sums(saliencies, metric, model_wide=selection.model_wide)
    _check_fit(saliencies[0], selection)
    actions = np.where(np.isnan(ranks), "", "keep").astype("<U5")
    if selection.action != "analyze":
        for layer, expert in _chosen(ranks, selection):
            actions[layer, expert] = selection.action
    source = {
        "files": list(files),
        "metric": metric,
        "selection_mode": "model_wide" if selection.model_wide else "per_layer",
        "action_mode": selection.action,
    }
    filters = {name: getattr(selection, name) for name in ("min_rank", "max_rank", "n_prune")}
    return ExpertList(ranks, actions, source, filters)


def _chosen(ranks: np.ndarray, selection: SelectionRules) -> list[tuple[int, int]]:
    """Layer and expert of all that go."""
    may_go = _removable(ranks, selection)
    groups = {"in the whole model": may_go}
    if not selection.model_wide:
        groups = {
            f"in layer {layer}": [pair for pair in may_go if pair[0] == layer] for layer in range(len(ranks))
        }
    where, tightest = min(groups.items(), key=lambda group: len(group[1]))
    if selection.n_prune > len(tightest):
        raise UserError(
            f"expected to remove at most {len(tightest)} experts {where}, got --n-prune {selection.n_prune}; "
            "protected and ignored experts, those outside the rank filter, the best of a layer if strided, and "
            f"{selection.min_experts_per_layer} per layer stay: lower --n-prune or loosen those"
        )
    targets = _targets(ranks.shape, selection)
    return [pair for group in groups.values() for pair in _take(group, selection, targets)]


def _take(
    may_go: list[tuple[int, int]], selection: SelectionRules, targets: np.ndarray
) -> list[tuple[int, int]]:
    """``n_prune`` of the experts that may go, which come in the order in which they should."""
    if selection.strategy == "bottom":
        return may_go[: selection.n_prune]
    first = [pair for pair in may_go if targets[pair]][: selection.n_prune]
    rest = [pair for pair in may_go if not targets[pair]]
    return first + strided(rest, selection.n_prune - len(first))


def strided(worst_first: list, number: int) -> list:
    """``number`` items spread evenly over the first half of the list, or over as many as it takes; the first is in."""
    window = max(-(-len(worst_first) // 2), number)
    return [worst_first[index * window // number] for index in range(number)]


def _removable(ranks: np.ndarray, selection: SelectionRules) -> list[tuple[int, int]]:
    """Experts any number of which, from the front, may go: targets first, then from worst to best.

    Of equal experts the one with the higher number goes first, and of those the one in the later layer.
    """
    candidates = free_experts(ranks, selection)
    layers, experts = np.nonzero(candidates)
    targets = _targets(ranks.shape, selection)[layers, experts]
    order = np.lexsort((-layers, -experts, -ranks[layers, experts], ~targets))
    room = (~np.isnan(ranks)).sum(axis=1) - selection.min_experts_per_layer
    removable = []
    for layer, expert in zip(layers[order].tolist(), experts[order].tolist(), strict=True):
        if room[layer] > 0:
            room[layer] -= 1
            removable.append((layer, expert))
    return removable


def free_experts(ranks: np.ndarray, selection: SelectionRules) -> np.ndarray:
    """Bool ``[L, E]``: experts that no rule holds."""
    candidates = ~np.isnan(ranks)
    if selection.min_rank is not None:
        candidates &= ranks >= selection.min_rank
    if selection.max_rank is not None:
        candidates &= ranks <= selection.max_rank
    candidates[:, sorted(selection.ignored)] = False
    if selection.safety is not None and selection.safety_mode == "protect":
        candidates &= ~selection.safety.mask
    if selection.domain is not None:
        candidates &= ~selection.domain.mask
    if selection.strategy == "strided":
        candidates[np.arange(len(ranks)), np.nanargmin(ranks, axis=1)] = False
    return candidates


def _targets(shape: tuple[int, ...], selection: SelectionRules) -> np.ndarray:
    if selection.safety is not None and selection.safety_mode == "target":
        return selection.safety.mask
    return np.zeros(shape, dtype=bool)


def _check_fit(saliency: Saliency, selection: SelectionRules) -> None:
    """Refuse maps and expert ids of another model."""
    beyond = [expert for expert in sorted(selection.ignored) if not 0 <= expert < saliency.num_experts]
    if beyond:
        raise UserError(
            f"expected --ignore-experts to name experts 0 to {saliency.num_experts - 1}, got {beyond[0]}"
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


def _check_choice(option: str, value: str, known: Sequence[str]) -> None:
    if value not in known:
        raise UserError(f"expected {option} {' or '.join(known)}, got {value!r}{nearest(value, known)}")


def _check_at_least(option: str, value: int, least: int) -> None:
    if value < least:
        raise UserError(f"expected {option} of at least {least}, got {value}")
