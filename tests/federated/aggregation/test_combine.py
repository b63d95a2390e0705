from __future__ import annotations

import statistics
from dataclasses import replace
from typing import get_args

import numpy as np
import pytest
import torch

from configs.run_views import Combine
from federated.aggregation.combine import aggregate, unit_factors
from federated.aggregation.contribution import Contribution, summarize
from federated.updates.update import SparseUpdate, SparseVector

SIZES = {(0, 0): 6, (0, 1): 6, (1, 0): 9, (1, -1): 3}


def contribution(weight, entries, *, inclusion=None, trained=None):
    """``entries``: {unit: {index: value}}."""
    vectors = {unit: SparseVector(SIZES[unit], list(e), list(e.values())) for unit, e in entries.items()}
    update = SparseUpdate(0, "", vectors)
    return Contribution(weight, lambda: update, inclusion or {}, trained)


def random_round(seed, clients):
    rng = np.random.default_rng(seed)
    result = []
    for _ in range(clients):
        trained = {unit for unit in SIZES if rng.random() < 0.8}
        shipped = {unit for unit in sorted(trained) if rng.random() < 0.7}
        entries = {
            u: {i: float(rng.normal()) for i in range(SIZES[u]) if rng.random() < 0.5}
            for u in sorted(shipped)
        }
        inclusion = {u: float(rng.uniform(0.2, 1)) for u in sorted(shipped) if rng.random() < 0.7}
        result.append(contribution(float(rng.uniform(1, 9)), entries, inclusion=inclusion, trained=trained))
    return result


def walk(contributions, combine, learning_rate, clip):
    """The same sums entry by entry in plain Python."""
    norms = [
        sum(x * x for v in c.unpack().vectors.values() for x in v.values.tolist()) ** 0.5
        for c in contributions
    ]
    limit = clip * statistics.median_low(norms)
    steps = {}
    for unit, size in SIZES.items():
        if not any(unit in c.unpack().vectors for c in contributions):
            continue
        below, entries = 0.0, [[] for _ in range(size)]
        for c, norm in zip(contributions, norms, strict=True):
            probability = 1.0 if combine == "mean" else c.inclusion.get(unit, 1.0)
            shipped, trained = unit in c.unpack().vectors, c.trained is None or unit in c.trained
            if combine == "mean" or (combine == "horvitz-thompson" and trained):
                below += c.weight
            elif combine == "hajek" and shipped:
                below += c.weight / probability
            if shipped:
                factor = min(1.0, limit / norm) if clip and norm else 1.0
                vector = c.unpack().vectors[unit]
                for index, value in zip(vector.indices.tolist(), vector.values.tolist(), strict=True):
                    entries[index].append((factor * value, c.weight / probability))
        steps[unit] = [learning_rate * combined(each, combine, below) for each in entries]
    return steps


def combined(entries, combine, below):
    """One entry of a step, of its values and their weights."""
    trim = {"trimmed-mean": 0.2, "median": 0.5}.get(combine)
    if trim is not None and len(entries) > 2:
        cut = min(max(int(trim * len(entries)), 1), (len(entries) - 1) // 2)
        entries = sorted(entries)[cut : len(entries) - cut]
    total = below if combine in ("mean", "hajek", "horvitz-thompson") else sum(w for _, w in entries)
    return sum(w * value for value, w in entries) / (total or 1.0)


@pytest.mark.parametrize("combine", get_args(Combine))
@pytest.mark.parametrize(
    "seed, clients, learning_rate, clip",
    [(0, 1, 1.0, 0), (1, 5, 0.7, 0), (2, 6, 1.0, 0.9), (3, 14, 1.0, 0.9)],
)
def test_equals_a_walk_over_the_entries(combine, seed, clients, learning_rate, clip):
    contributions = random_round(seed, clients)
    result = aggregate(
        contributions, combine=combine, server_learning_rate=learning_rate, clip_norm_multiple=clip
    )
    expected = walk(contributions, combine, learning_rate, clip)
    assert set(result) == set(expected)
    for unit, step in result.items():
        assert step.dtype == torch.float32 and step.shape == (SIZES[unit],)
        np.testing.assert_allclose(step.numpy(), expected[unit], rtol=2e-6, atol=1e-7)


def test_entrywise_counts_in_full_what_one_client_alone_ships():
    first = contribution(1.0, {(0, 0): {0: 4.0, 1: 4.0}})
    second = contribution(3.0, {(0, 0): {1: 8.0, 2: 8.0}})
    step = aggregate([first, second], combine="entrywise")[(0, 0)]
    assert step.tolist() == pytest.approx([4, 7, 8, 0, 0, 0])


def test_one_client_with_hajek_is_its_own_change_whatever_weight_and_probability():
    one = contribution(17.0, {(0, 0): {1: 2.0, 4: -1.0}}, inclusion={(0, 0): 0.3})
    assert aggregate([one])[(0, 0)].tolist() == pytest.approx([0, 2, 0, 0, -1, 0])


def test_a_unit_nobody_shipped_is_absent_and_only_shippers_count_in_hajek():
    first, second = contribution(1.0, {(0, 0): {0: 4.0}}), contribution(3.0, {(1, 0): {2: 8.0}})
    hajek, mean = aggregate([first, second]), aggregate([first, second], combine="mean")
    assert set(hajek) == set(mean) == {(0, 0), (1, 0)}
    assert (hajek[(0, 0)][0], hajek[(1, 0)][2]) == (4.0, 8.0)
    assert (mean[(0, 0)][0], mean[(1, 0)][2]) == (1.0, 6.0)


def test_horvitz_thompson_divides_by_those_that_trained_the_unit():
    sender = contribution(1.0, {(0, 0): {0: 4.0}}, inclusion={(0, 0): 0.5}, trained={(0, 0)})
    trained, other = contribution(1.0, {}, trained={(0, 0)}), contribution(5.0, {}, trained={(1, 0)})
    step = aggregate([sender, trained, other], combine="horvitz-thompson")
    assert step[(0, 0)][0] == pytest.approx(4.0)


def test_a_client_that_shipped_nothing_still_counts_in_the_mean():
    step = aggregate([contribution(1.0, {(0, 0): {0: 4.0}}), contribution(1.0, {})], combine="mean")
    assert step[(0, 0)][0] == 2.0


def test_clipping_bounds_the_loud_client_and_leaves_the_others():
    quiet = [contribution(1.0, {(0, 0): {0: 1.0}}) for _ in range(2)]
    loud = contribution(1.0, {(0, 0): {0: 100.0}})
    assert aggregate([*quiet, loud], clip_norm_multiple=2.0)[(0, 0)][0] == pytest.approx((1 + 1 + 2) / 3)
    assert aggregate([*quiet, loud])[(0, 0)][0] == pytest.approx(102 / 3)


def test_updates_may_be_unpacked_anew_for_each_pass_and_come_from_a_generator():
    contributions, unpacked = random_round(3, 4), []

    def lazily(one, summary):
        def unpack():
            unpacked.append(one)
            return one.unpack()

        return replace(one, unpack=unpack, summary=summary)

    expected = aggregate(contributions, clip_norm_multiple=1.0)
    for known, passes in ((False, 2), (True, 1)):
        unpacked.clear()
        replies = (lazily(c, summarize(c.unpack()) if known else None) for c in contributions)
        result = aggregate(replies, clip_norm_multiple=1.0)
        assert all(torch.equal(result[unit], step) for unit, step in expected.items())
        assert len(unpacked) == passes * len(contributions)


def test_only_one_update_is_unpacked_at_a_time():
    alive, most = [0], [0]

    class Counted(SparseUpdate):
        def __del__(self):
            alive[0] -= 1

    def unpack():
        alive[0] += 1
        most[0] = max(most[0], alive[0])
        return Counted(0, "", {(0, 0): SparseVector(6, [1], [2.0])})

    step = aggregate([Contribution(1.0, unpack) for _ in range(9)], clip_norm_multiple=1.0)
    assert step[(0, 0)].tolist() == [0, 2, 0, 0, 0, 0]
    assert alive[0] == 0 and most[0] == 1


@pytest.mark.parametrize("combine", get_args(Combine))
def test_huge_weights_and_values_do_not_overflow(combine):
    entries = {(0, 0): {0: 1e30, 1: -1e30}}
    huge = [contribution(1e307, entries), contribution(1e308, entries), contribution(1e308, entries)]
    assert aggregate(huge, combine=combine)[(0, 0)][:2].tolist() == pytest.approx([1e30, -1e30])


def test_hajek_bears_any_probability_that_all_shippers_share():
    entries = {(0, 0): {0: 3.0}}
    shared = [contribution(2.0, entries, inclusion={(0, 0): 1e-300}) for _ in range(3)]
    assert aggregate(shared)[(0, 0)][0] == pytest.approx(3.0)


@pytest.mark.parametrize("contributions", [[], iter([])])
def test_no_client_is_an_error(contributions):
    with pytest.raises(ValueError, match="at least one client"):
        aggregate(contributions)


@pytest.mark.parametrize("combine", ["trimmed-mean", "median"])
def test_one_of_three_cannot_set_an_entry_that_all_ship(combine):
    honest = [contribution(1.0, {(0, 0): {0: value, 1: 1.0}}) for value in (1.0, 2.0)]
    for lie in (1e4, -1e4):
        liar = contribution(2.0, {(0, 0): {0: lie, 5: lie}})
        step = aggregate([*honest, liar], combine=combine)[(0, 0)].tolist()
        assert step == [pytest.approx(2.0 if lie > 0 else 1.0), 1.0, 0.0, 0.0, 0.0, lie]


def test_the_share_that_is_trimmed_can_be_set():
    clients = [contribution(1.0, {(0, 0): {0: value}}) for value in (0.0, 1.0, 2.0, 6.0, 7.0)]
    found = [
        aggregate(clients, combine="trimmed-mean", trim_share=share)[(0, 0)][0].item()
        for share in (0.0, 0.2, 0.4)
    ]
    assert found == [3.0, 3.0, 2.0]


def test_units_are_clipped_apart():
    quiet = [contribution(1.0, {(0, 0): {0: 1.0}, (1, 0): {0: 1.0}}) for _ in range(2)]
    loud = contribution(1.0, {(0, 0): {0: 9.0}, (1, 0): {0: 1.0}})
    step = aggregate([*quiet, loud], clip_unit_multiple=2.0)
    assert step[(0, 0)][0] == pytest.approx(4 / 3) and step[(1, 0)][0] == pytest.approx(1.0)


def test_what_cannot_be_is_an_error():
    entries = {(0, 0): {0: 1.0}}
    wrong_size = Contribution(1.0, lambda: SparseUpdate(0, "", {(0, 0): SparseVector(7, [0], [1.0])}))
    cases = [
        ([contribution(0.0, entries)], "weight"),
        ([contribution(float("nan"), entries)], "weight"),
        ([contribution(1.0, entries, inclusion={(0, 0): 0.0})], "probability"),
        ([contribution(1.0, entries, inclusion={(0, 0): 1.5})], "probability"),
        ([contribution(1.0, entries, trained=set())], "did not train"),
        ([contribution(1.0, entries), wrong_size], "entries from one client"),
        ([contribution(1e308, entries), contribution(5e-324, entries)], "vanishes"),
    ]
    for contributions, reason in cases:
        for combine in ("hajek", "median"):
            with pytest.raises(ValueError, match=reason):
                aggregate(contributions, combine=combine)
    tiny = contribution(1.0, entries, inclusion={(0, 0): 1e-300})
    with pytest.raises(ValueError, match="finite factor"):
        aggregate([tiny], combine="horvitz-thompson")
    with pytest.raises(ValueError, match="finite factor"):
        aggregate([contribution(1.0, entries)], server_learning_rate=1e300)
    with pytest.raises(ValueError, match="combine"):
        aggregate([contribution(1.0, entries)], combine="middle")


def test_factors_of_one_unit_by_hand():
    unit = (0, 0)
    clients = [
        contribution(1.0, {unit: {0: 1.0}}, inclusion={unit: 0.5}),
        contribution(3.0, {unit: {0: 1.0}}),
        contribution(4.0, {}, trained={unit}),
        contribution(8.0, {}, trained=set()),
    ]
    shipped = [{unit}, {unit}, set(), set()]
    expected = {"hajek": (2 / 5, 3 / 5), "horvitz-thompson": (2 / 8, 3 / 8), "mean": (1 / 16, 3 / 16)}
    for combine, (first, second) in expected.items():
        factors = unit_factors(clients, shipped, combine)
        assert [each.get(unit) for each in factors] == [
            pytest.approx(first),
            pytest.approx(second),
            None,
            None,
        ]
