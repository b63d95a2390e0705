from __future__ import annotations

import re
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from configs.choices import Metric
from configs.errors import UserError
from experts.saliency.expert_map import ExpertMap
from experts.selection.expert_list import ExpertList, load_expert_list, write_expert_list
from experts.selection.rules import SelectionRules, parse_expert_ids, select_experts, strided
from tests.support.saliency_samples import map_of, random_saliency, saliency_of_scores

# From the best to the worst: 0, 1, 2, ... in every layer.
FALLING = saliency_of_scores([[8, 7, 6, 5, 4, 3, 2, 1], [80, 70, 60, 50, 40, 30, 20, 10]])
SHAPE = [8, 8]


def removed(experts: ExpertList) -> list[list[int]]:
    return [np.flatnonzero((row != "keep") & (row != "")).tolist() for row in experts.actions]


def select(**options) -> list[list[int]]:
    return removed(select_experts([FALLING], "freq", SelectionRules(**options)))


def test_the_worst_of_each_layer_go():
    assert select(n_prune=3) == [[5, 6, 7], [5, 6, 7]]
    assert select(n_prune=0) == [[], []]
    assert select(n_prune=7) == [[1, 2, 3, 4, 5, 6, 7]] * 2


@pytest.mark.parametrize("metric", Metric)
def test_the_metric_decides(metric):
    saliency = random_saliency([6, 6], 3)
    chosen = removed(select_experts([saliency], metric, SelectionRules(n_prune=2)))
    scores = saliency.scores(metric)
    assert chosen == [sorted(np.argsort(row)[:2].tolist()) for row in scores]


def test_merged_experts_are_marked_as_such():
    experts = select_experts([FALLING], "freq", SelectionRules(n_prune=2, action="merge"))
    assert set(experts.actions.flat) == {"keep", "merge"} and removed(experts) == [[6, 7], [6, 7]]
    assert experts.statistics["total_pruned"] == 4


def test_analyze_writes_ranks_and_removes_nothing():
    experts = select_experts([FALLING], "freq", SelectionRules(n_prune=3, action="analyze"))
    assert removed(experts) == [[], []] and experts.rank_sum[0].tolist() == list(range(1, 9))


def test_the_source_and_the_filters_are_told():
    selection = SelectionRules(n_prune=2, model_wide=True, min_rank=3, max_rank=16, action="merge")
    experts = select_experts([FALLING], "ean", selection, files=["a", "b"])
    assert experts.source == {
        "files": ["a", "b"],
        "metric": "ean",
        "selection_mode": "model_wide",
        "action_mode": "merge",
    }
    assert experts.filters == {"min_rank": 3, "max_rank": 16, "n_prune": 2}


def test_model_wide_selection_by_raw_sums_does_not_let_large_norm_layers_dominate():
    # By raw sums the seven worst of the model would all be of layer 0.
    assert select(n_prune=6, model_wide=True) == [[5, 6, 7], [5, 6, 7]]


def test_model_wide_takes_more_where_a_layer_is_more_uneven():
    uneven = saliency_of_scores([[100, 1, 1, 1], [5, 5, 5, 5]])
    experts = select_experts([uneven], "freq", SelectionRules(n_prune=3, model_wide=True))
    assert removed(experts) == [[1, 2, 3], []]


def test_the_minimum_per_layer_is_kept_and_not_only_warned_about():
    uneven = saliency_of_scores([[100, 1, 1, 1], [5, 5, 5, 5]])
    selection = SelectionRules(n_prune=3, model_wide=True, min_experts_per_layer=3)
    with pytest.raises(UserError, match="at most 2 experts in the whole model, got `n_prune` 3"):
        select_experts([uneven], "freq", selection)
    allowed = SelectionRules(n_prune=2, model_wide=True, min_experts_per_layer=3)
    assert removed(select_experts([uneven], "freq", allowed)) == [[3], [3]]
    with pytest.raises(UserError, match="at most 4 experts in layer 0, got `n_prune` 5"):
        select(n_prune=5, min_experts_per_layer=4)
    with pytest.raises(UserError, match="at most 0 experts"):
        select(n_prune=1, min_experts_per_layer=9)
    assert select(n_prune=0, min_experts_per_layer=9) == [[], []]


def test_every_layer_has_its_own_count_and_not_that_of_the_first():
    unequal = saliency_of_scores([[2, 1], [5, 4, 3, 2, 1], [3, 2, 1]])
    experts = select_experts([unequal], "freq", SelectionRules(n_prune=1))
    assert removed(experts) == [[1], [4], [2]]
    assert (experts.actions == "").sum() == 15 - 10
    with pytest.raises(UserError, match="at most 1 experts in layer 0, got `n_prune` 2"):
        select_experts([unequal], "freq", SelectionRules(n_prune=2))
    assert experts.statistics == {"num_layers": 3, "num_experts": 5, "total_kept": 7, "total_pruned": 3}


def test_protected_experts_are_never_pruned_silently_when_n_is_too_large():
    flagged = {0: [7, 6, 5, 4, 3]}
    safety = map_of("safety", SHAPE, flagged)
    assert select(n_prune=2, safety=safety) == [[1, 2], [6, 7]]
    with pytest.raises(UserError, match="at most 3 experts in layer 0, got `n_prune` 4.*protected"):
        select(n_prune=4, safety=safety)
    domain = map_of("domain", SHAPE, {1: [0, 1, 2, 3, 4, 5, 6]})
    with pytest.raises(UserError, match="at most 1 experts in layer 1, got `n_prune` 2"):
        select(n_prune=2, safety=safety, domain=domain)


def test_targeted_experts_go_first_in_order_of_rank():
    safety = map_of("safety", SHAPE, {0: [1, 3, 2]})
    target = {"safety": safety, "safety_mode": "target"}
    assert select(n_prune=1, **target) == [[3], [7]]
    assert select(n_prune=2, **target) == [[2, 3], [6, 7]]
    assert select(n_prune=4, **target) == [[1, 2, 3, 7], [4, 5, 6, 7]]
    assert select(n_prune=3, model_wide=True, **target) == [[1, 2, 3], []]


def test_what_is_protected_or_ignored_is_not_targeted():
    safety = map_of("safety", SHAPE, {0: [1, 2, 3]})
    chosen = select(
        n_prune=2,
        safety=safety,
        safety_mode="target",
        domain=map_of("domain", SHAPE, {0: [3]}),
        ignored=frozenset({2}),
    )
    assert chosen == [[1, 7], [6, 7]]


def test_ignored_experts_stay_in_every_layer():
    assert select(n_prune=2, ignored=frozenset({7, 5})) == [[4, 6], [4, 6]]
    with pytest.raises(UserError, match="experts 0 to 7, got 8"):
        select(n_prune=2, ignored=frozenset({8}))


def test_a_rank_filter_drops_no_expert_from_the_table(tmp_path):
    experts = select_experts([FALLING], "freq", SelectionRules(n_prune=2, min_rank=3, max_rank=6))
    assert removed(experts) == [[4, 5], [4, 5]]
    csv_path, json_path = write_expert_list(experts, tmp_path)
    assert len(csv_path.read_text().splitlines()) == 1 + 16
    for path in (csv_path, json_path):
        assert load_expert_list(path)[0].tolist() == [0, 1, 2, 3, 6, 7]
    with pytest.raises(UserError, match="at most 4 experts in layer 0.*rank filter"):
        select(n_prune=5, min_rank=3, max_rank=6)


def test_the_guarded_best_of_every_layer_stay_in_a_model_wide_selection(tmp_path):
    layers = saliency_of_scores([[8, 7, 6, 5], [1, 1, 1, 97]])
    wide = {"n_prune": 4, "model_wide": True, "min_experts_per_layer": 1}
    chosen = [select_experts([layers], "freq", SelectionRules(**wide, guard_top=guard)) for guard in (0, 50)]
    assert [removed(each) for each in chosen] == [[[3], [0, 1, 2]], [[2, 3], [1, 2]]]
    assert chosen[1].filters["guard_top"] == 50 and "guard_top" not in chosen[0].filters
    for path in write_expert_list(chosen[1], tmp_path):
        assert load_expert_list(path)[1].tolist() == [0, 3]
    with pytest.raises(UserError, match="at most 2 experts in the whole model.*guarded"):
        select_experts([layers], "freq", SelectionRules(**wide, guard_top=51))


def test_the_rank_filter_is_on_sums_of_ranks():
    experts = select_experts([FALLING, FALLING], "freq", SelectionRules(n_prune=1, max_rank=6))
    assert removed(experts) == [[2], [2]]


def test_strided_spreads_over_the_worse_half_and_spares_the_best_of_a_layer():
    assert select(n_prune=2, strategy="strided") == [[5, 7], [5, 7]]
    assert select(n_prune=4, strategy="strided") == [[4, 5, 6, 7], [4, 5, 6, 7]]
    assert select(n_prune=7, strategy="strided") == [[1, 2, 3, 4, 5, 6, 7]] * 2


def test_strided_never_deletes_a_protected_or_top_expert():
    safety = map_of("safety", SHAPE, {0: [7, 5, 3, 1], 1: [2]})
    assert select(n_prune=3, strategy="strided", safety=safety)[0] == [2, 4, 6]
    with pytest.raises(UserError, match="at most 3 experts in layer 0.*best of a layer"):
        select(n_prune=4, strategy="strided", safety=safety)
    # Even where the best one is targeted.
    best = {"safety": map_of("safety", SHAPE, {0: [0, 1]}), "safety_mode": "target"}
    assert select(n_prune=2, strategy="strided", **best)[0] == [1, 7]


def test_the_stride_takes_the_first_and_stays_in_the_first_half():
    worst_first = list(range(10))
    assert [strided(worst_first, number) for number in (0, 1, 2, 5, 7, 10)] == [
        [],
        [0],
        [0, 2],
        [0, 1, 2, 3, 4],
        [0, 1, 2, 3, 4, 5, 6],
        worst_first,
    ]
    assert strided([], 0) == []


def test_of_equal_experts_those_with_the_higher_numbers_go():
    alike = saliency_of_scores([[1, 1, 1, 1]])
    assert removed(select_experts([alike], "freq", SelectionRules(n_prune=2))) == [[2, 3]]
    assert removed(select_experts([alike], "freq", SelectionRules(n_prune=3, strategy="strided"))) == [
        [1, 2, 3]
    ]


@st.composite
def cases(draw):
    shape = draw(st.lists(st.integers(1, 7), min_size=1, max_size=4))

    def flags() -> dict[int, list[int]]:
        return {layer: draw(st.lists(st.integers(0, n - 1), max_size=2)) for layer, n in enumerate(shape)}

    maps = {kind: draw(st.none() | st.just(map_of(kind, shape, flags()))) for kind in ("safety", "domain")}
    saliencies = [random_saliency(shape, seed) for seed in draw(st.lists(st.integers(0, 50), min_size=1))[:3]]
    low = draw(st.none() | st.integers(1, 4))
    selection = SelectionRules(
        n_prune=draw(st.integers(0, 6)),
        model_wide=draw(st.booleans()),
        strategy=draw(st.sampled_from(["bottom", "strided"])),
        action=draw(st.sampled_from(["prune", "merge"])),
        min_rank=low,
        max_rank=draw(st.none() | st.integers(low or 1, 60)),
        guard_top=draw(st.sampled_from([0.0, 20.0, 60.0])),
        min_experts_per_layer=draw(st.integers(1, 3)),
        ignored=frozenset(draw(st.sets(st.integers(0, max(shape) - 1), max_size=2))),
        safety=maps["safety"],
        safety_mode=draw(st.sampled_from(["protect", "target"])) if maps["safety"] else "protect",
        domain=maps["domain"],
    )
    return saliencies, draw(st.sampled_from(list(Metric))), selection


@settings(max_examples=200, deadline=None)
@given(case=cases())
def test_exactly_n_go_or_the_error_says_how_many_can(case):
    saliencies, metric, selection = case
    try:
        experts = select_experts(saliencies, metric, selection)
    except UserError as error:
        possible = int(re.search(r"at most (\d+) experts", str(error))[1])
        assert possible < selection.n_prune
        _check(*_reduced(case, possible))
        return
    _check(case, experts)


def _reduced(case, possible: int):
    saliencies, metric, selection = case
    options = {name: getattr(selection, name) for name in SelectionRules.__dataclass_fields__}
    smaller = SelectionRules(**{**options, "n_prune": possible})
    return (saliencies, metric, smaller), select_experts(saliencies, metric, smaller)


def _check(case, experts: ExpertList) -> None:
    """What holds for every list, whatever the options."""
    saliencies, _, selection = case
    gone, present = experts.actions == selection.action, saliencies[0].present
    counts = gone.sum(axis=1)
    assert (
        [int(counts.sum())] == [selection.n_prune]
        if selection.model_wide
        else set(counts) == {selection.n_prune}
    )
    np.testing.assert_array_equal(experts.actions != "", present)
    assert not gone[:, sorted(selection.ignored)].any()
    if selection.safety is not None and selection.safety_mode == "protect":
        assert not (gone & selection.safety.mask).any()
    if selection.domain is not None:
        assert not (gone & selection.domain.mask).any()
    for layer, number in enumerate(saliencies[0].experts_per_layer):
        guarded = np.argsort(experts.rank_sum[layer, :number], kind="stable")[
            : -(-number * int(selection.guard_top) // 100)
        ]
        assert not gone[layer, guarded].any()
    low, high = selection.min_rank or 0, selection.max_rank or np.inf
    assert ((low <= experts.rank_sum[gone]) & (experts.rank_sum[gone] <= high)).all()
    kept = (experts.actions == "keep").sum(axis=1)
    assert (kept[counts > 0] >= selection.min_experts_per_layer).all() and (kept > 0).all()
    if selection.strategy == "strided":
        best = np.nanargmin(experts.rank_sum, axis=1)
        assert not gone[np.arange(len(best)), best].any()


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 99), number=st.integers(0, 5))
def test_a_list_only_grows_with_n(seed, number):
    saliency = random_saliency([6, 7], seed)
    fewer = removed(select_experts([saliency], "reap", SelectionRules(n_prune=number)))
    assume(number < 5)
    more = removed(select_experts([saliency], "reap", SelectionRules(n_prune=number + 1)))
    assert all(set(one) < set(other) for one, other in zip(fewer, more, strict=True))


@pytest.mark.parametrize(
    "options, words",
    [
        ({"strategy": "top"}, "`strategy` to be bottom or strided, got 'top'"),
        ({"action": "analyse"}, "`action` .*did you mean 'analyze'"),
        ({"safety_mode": "targets"}, "`safety_mode` to be protect or target.*did you mean 'target'"),
        ({"domain_mode": "target"}, "`domain_mode` to be protect, got 'target'"),
        ({"n_prune": -1}, "`n_prune` of at least 0"),
        ({"min_experts_per_layer": 0}, "`min_experts_per_layer` of at least 1"),
        ({"guard_top": 101}, "`guard_top` to be a percentage from 0 to 100, got 101"),
        ({"min_rank": 3, "max_rank": 2}, "`min_rank` to be at most `max_rank`"),
        ({"min_rank": float("nan"), "max_rank": 2}, "`min_rank` to be at most `max_rank`"),
        ({"safety_mode": "target"}, "`safety_map` with `safety_mode` target"),
        ({"safety": map_of("domain", SHAPE, {})}, "kind safety as `safety_map`, got one of domain"),
        ({"domain": map_of("safety", SHAPE, {})}, "kind domain as `domain_map`, got one of safety"),
    ],
)
def test_conflicts_are_refused_at_construction(options, words):
    with pytest.raises(UserError, match=words):
        SelectionRules(**options)


def test_a_map_of_another_model_is_refused():
    with pytest.raises(UserError, match="safety map of the model"):
        select(safety=map_of("safety", [8, 7], {}))
    scores, none = np.zeros((2, 8)), np.ones(2)
    other = ExpertMap("domain", scores, none, {}, {"model_fingerprint": "other"})
    saliency = random_saliency(SHAPE, model_fingerprint="this")
    with pytest.raises(UserError, match="domain map of the model"):
        select_experts([saliency], "reap", SelectionRules(domain=other))
    assert select(domain=other) == [[], []]


@pytest.mark.parametrize(
    "text, ids",
    [
        ("", set()),
        ("3", {3}),
        ("1,2,250..255", {1, 2, *range(250, 256)}),
        (" 4 , 4..4, 2 .. 3,", {2, 3, 4}),
    ],
)
def test_expert_ids_are_parsed_with_ranges_that_include_their_end(text, ids):
    assert parse_expert_ids(text) == ids


@pytest.mark.parametrize(
    "text",
    ["a", "1-3", "-1", "5..3", "1..", "..3", "1...3", "1..2..3", "1.5", "1 2", "0..999999999999", "65536"],
)
def test_what_are_no_expert_ids_is_refused(text):
    with pytest.raises(UserError, match=r"expert ids such as 1,2,250\.\.255"):
        parse_expert_ids(text)


def test_shared_experts_are_neither_removed_nor_counted():
    # Rising: the first experts, which are shared, have the worst ranks.
    rising = saliency_of_scores([[1, 2, 3, 4, 5, 6], [10, 20, 30, 40, 50, 60]])
    shared = replace(rising, num_shared=(2, 1))
    for options, expected in (
        ({"n_prune": 2}, [[2, 3], [1, 2]]),
        ({"n_prune": 3, "model_wide": True}, [[2], [1, 2]]),
        ({"n_prune": 1, "strategy": "strided"}, [[2], [1]]),
        ({"n_prune": 7, "model_wide": True}, [[2, 3, 4], [1, 2, 3, 4]]),
    ):
        assert removed(select_experts([shared], "freq", SelectionRules(**options))) == expected
    with pytest.raises(UserError, match=r"at most 2 experts in layer 0.*shared"):
        select_experts([shared], "freq", SelectionRules(n_prune=3, min_experts_per_layer=2))
    with pytest.raises(
        UserError, match=r"other shared experts in file 2 \(\[0, 0\]\) than in the first \(\[2, 1\]\)"
    ):
        select_experts([shared, rising], "freq", SelectionRules(n_prune=1))
