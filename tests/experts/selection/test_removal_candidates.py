"""Candidates for the next removal."""

from __future__ import annotations

import numpy as np

from experts.selection.compression_trace import Removal
from experts.selection.removal_candidates import RemovalCandidates

NAN = np.nan
RANKS = np.array([[1.0, 4.0, 6.0], [2.0, 3.0, NAN], [5.0, 7.0, 8.0]])


def candidates(ranks=RANKS, *, held=(), shared=0, least=1, largest=4):
    routed = ~np.isnan(ranks)
    routed[:, :shared] = False
    free = routed.copy()
    for place in held:
        free[place] = False
    return RemovalCandidates(ranks, free, routed, min_experts_per_layer=least, max_group_size=largest)


def likeness(**pairs):
    """Per layer zeros, but for pairs such as l0_12 = 0.5: experts 1 and 2 of layer 0."""
    found = [np.zeros((number, number)) for number in (3, 2, 3)]
    for name, value in pairs.items():
        layer, one, other = int(name[1]), int(name[3]), int(name[4])
        found[layer][one, other] = found[layer][other, one] = value
    return found


def drain(these):
    order = []
    while (removal := these.to_prune()) is not None:
        these.take(removal)
        order.append((removal.layer, removal.expert))
    return order


def test_the_worst_rank_goes_first_and_every_layer_keeps_its_minimum():
    assert drain(candidates()) == [(2, 2), (2, 1), (0, 2), (0, 1), (1, 1)]
    assert drain(candidates(least=2)) == [(2, 2), (0, 2)]


def test_shared_experts_are_neither_removed_nor_merged_into_nor_counted():
    assert drain(candidates(shared=1)) == [(2, 2), (0, 2)]
    alike = likeness(l0_01=0.9, l0_02=0.8, l0_12=0.1, l2_01=0.7, l2_12=0.2)
    assert candidates(shared=1).to_merge(alike) == Removal(2, 2, 1)
    assert candidates(shared=1, least=2).to_merge(alike) is None
    assert drain(candidates(least=3)) == []


def test_held_experts_never_go():
    assert drain(candidates(held=[(2, 2), (1, 1)])) == [(2, 1), (0, 2), (2, 0), (0, 1), (1, 0)]


def test_of_equal_experts_the_higher_number_and_then_the_later_layer_goes():
    assert drain(candidates(np.full((2, 2), 2.5))) == [(1, 1), (0, 1)]


def test_the_most_alike_pair_merges_into_the_more_salient():
    these = candidates()
    assert these.to_merge(likeness(l0_02=0.4, l2_12=0.5)) == Removal(2, 2, 1)
    assert these.to_merge(likeness(l0_02=0.6, l2_12=0.5)) == Removal(0, 2, 0)
    assert these.to_merge(likeness(l1_01=0.1)) == Removal(1, 1, 0)
    # An expert is most like itself, which is no pair.
    assert these.to_merge([np.eye(3), np.eye(2) - 0.5, np.eye(3) - 0.5]).layer == 0


def test_likeness_below_zero_still_has_a_best():
    assert candidates().to_merge([np.full((n, n), -0.5 - n) for n in (3, 2, 3)]).layer == 1


def test_a_held_expert_takes_others_in_but_does_not_go():
    these = candidates(held=[(2, 2)])
    assert these.to_merge(likeness(l2_12=0.9, l2_01=0.5)) == Removal(2, 1, 0)
    these = candidates(held=[(2, 1)])
    assert these.to_merge(likeness(l2_12=0.9)) == Removal(2, 2, 1)


def test_groups_do_not_outgrow_their_size():
    these = candidates(largest=2)
    these.take(Removal(0, 2, 0))
    assert these.to_merge(likeness(l0_01=0.9, l2_12=0.5)) == Removal(2, 2, 1)
    these.take(Removal(2, 2, 1))
    assert these.to_merge(likeness(l2_01=0.9)) == Removal(1, 1, 0)
    assert candidates(largest=1).to_merge(likeness(l0_01=0.9)) is None


def test_a_group_that_goes_brings_its_size():
    these = candidates(largest=2)
    these.take(Removal(0, 2, 1))
    assert these.to_merge([np.ones((3, 3)), np.zeros((2, 2)), np.zeros((3, 3))]).layer != 0


def test_with_one_expert_left_everywhere_there_is_nothing():
    these = candidates(np.array([[1.0], [2.0]]))
    assert these.to_prune() is None and these.to_merge([np.ones((1, 1))] * 2) is None


def test_a_refused_pair_makes_room_and_comes_back_when_its_loss_is_the_smaller():
    these, alike = candidates(), likeness(l0_02=0.6, l2_12=0.5, l1_01=0.4)
    first, second, third = Removal(0, 2, 0), Removal(2, 2, 1), Removal(1, 1, 0)
    assert these.to_merge(alike) == first
    these.refuse(first, 0.3)
    assert these.to_merge(alike) == these.to_merge(alike, 0.3) == second
    assert these.to_merge(alike, 0.31) == first
    these.refuse(second, 0.2)
    assert these.to_merge(alike, 0.25) == these.to_merge(alike, 0.5) == second
    assert these.to_merge(alike, 0.2) == third
    # A pruned candidate is no pair.
    these.refuse(Removal(1, 1), -5.0)
    assert these.to_merge(alike, 0.1) == third


def test_what_was_measured_for_an_expert_is_forgotten_when_it_takes_another_in():
    these, alike = candidates(), likeness(l2_01=0.6, l2_12=0.5)
    these.refuse(Removal(2, 1, 0), 9.0)
    assert these.to_merge(alike) == Removal(2, 2, 1)
    these.take(Removal(2, 2, 1))
    assert these.to_merge(alike) == Removal(2, 1, 0)


def test_refused_pairs_alone_offer_the_one_of_the_smallest_loss():
    these = candidates(np.array([[1.0, 2.0, 3.0]]))
    for pair, loss in ((Removal(0, 2, 0), 0.5), (Removal(0, 2, 1), 0.4), (Removal(0, 1, 0), 0.6)):
        these.refuse(pair, loss)
    assert these.to_merge([np.eye(3)], 0.1) == Removal(0, 2, 1)
    these.take(Removal(0, 2))
    assert these.to_merge([np.eye(3)], 0.1) == Removal(0, 1, 0)
