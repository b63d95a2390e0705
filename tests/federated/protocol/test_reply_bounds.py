from __future__ import annotations

from dataclasses import replace

import pytest

from federated.protocol.messages import Reply
from federated.protocol.reply_bounds import LARGEST_COUNT, NUMBERS, Range, check_numbers, check_reply
from federated.updates.update import RefusedUpdate

REPLY = Reply("law_dc+wiki-2", 3, 2, 0, "", {"examples": 5.0, "valid-nll": 3.0, "valid-tokens": 2.0})


def refused(reply: Reply) -> str:
    with pytest.raises(RefusedUpdate) as caught:
        check_reply(reply, num_experts=4)
    return caught.value.reason


def test_honest_replies_are_within_the_bounds():
    check_reply(REPLY, num_experts=4)
    for name in ("a", "Größe_1", "n" * 96):
        check_reply(replace(REPLY, name=name, budget=4, partition=0), num_experts=4)
    check_numbers({"valid-nll": 0.0})
    check_numbers({})
    check_numbers({name: float(bound.most) for name, bound in NUMBERS.items()})


@pytest.mark.parametrize("name", NUMBERS)
@pytest.mark.parametrize("value", [float("nan"), float("inf"), -float("inf"), -1.0, 1.7e308])
def test_no_number_is_without_bounds(name, value):
    assert f"expected {name} to be a" in refused(replace(REPLY, numbers={name: value}))


@pytest.mark.parametrize("name", [name for name, bound in NUMBERS.items() if bound.whole])
def test_counts_are_whole(name):
    assert "whole number" in refused(replace(REPLY, numbers={name: 2.5}))
    assert "whole number" in refused(replace(REPLY, numbers={name: 2.0 * LARGEST_COUNT}))


def test_a_loss_is_bounded_per_token():
    check_numbers({"valid-nll": 2e4, "valid-tokens": 2.0})
    for numbers in ({"valid-nll": 2.1e4, "valid-tokens": 2.0}, {"personal-nll": 1.0}):
        assert "per token" in refused(replace(REPLY, numbers=numbers))


def test_unknown_numbers_are_refused_and_shown_in_ascii_only():
    reason = refused(replace(REPLY, numbers={"\x1b[2J" + "x" * 99: 1.0}))
    assert reason.endswith("got '\\x1b[2J" + "x" * 28 + "'")


@pytest.mark.parametrize("name", ["", " ", "a b", "[red]x", "a\x00", "a\n", "x" * 97, "a/b", "\u202ea"])
def test_names_with_markup_or_control_characters_are_refused(name):
    reason = refused(replace(REPLY, name=name))
    assert reason.startswith("expected a name of 1 to 96") and reason.isascii() and reason.isprintable()


@pytest.mark.parametrize(("partition", "budget"), [(-1, 0), (2**31, 0), (0, -1), (0, 5)])
def test_partition_and_budget_have_a_range(partition, budget):
    assert "whole number from 0 to" in refused(replace(REPLY, partition=partition, budget=budget))


def test_a_range_includes_its_ends():
    bound = Range(1, 3, whole=True)
    for value in (1, 2, 3.0):
        bound.check("x", value)
    with pytest.raises(RefusedUpdate, match=r"expected x to be a finite number from 0 to 0.5, got 0.75"):
        Range(0, 0.5).check("x", 0.75)
