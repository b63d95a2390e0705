from __future__ import annotations

import pytest

from configs.errors import UserError
from configs.keys import Count, Keys, Share, check_known, integer_as_text, keys_of, validate_keys


class Example(Keys):
    warm_up: Count
    """Steps."""
    share: Share = 0.5
    """Share."""


def test_keys_are_hyphenated_and_documented():
    assert keys_of(Example) == ["warm-up", "share"]
    assert [field.description for field in Example.model_fields.values()] == ["Steps.", "Share."]
    assert validate_keys(Example, {"warm-up": 2}) == Example(warm_up=2, share=0.5)


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({}, "expected a value for warm-up, got none; set warm-up"),
        ({"warm-up": 0}, "expected warm-up to be a value greater than or equal to 1, got 0"),
        ({"warm-up": "2"}, "expected warm-up to be a valid integer, got '2'"),
        ({"warm-up": True}, "expected warm-up to be a valid integer, got True"),
        ({"warm-up": 1, "share": float("inf")}, "expected share to be a finite number, got inf"),
    ],
)
def test_the_first_problem_is_one_line(values, message):
    with pytest.raises(UserError) as caught:
        validate_keys(Example, values)
    assert str(caught.value) == message


def test_an_unknown_key_is_refused_with_the_nearest():
    check_known(["share"], ["share"], kind="key", listing="see there")
    with pytest.raises(UserError) as caught:
        check_known(["share", "shar"], iter(["share"]), kind="key", listing="see there")
    assert str(caught.value) == "unknown key 'shar' (did you mean 'share'?); see there"


def test_integers_become_text_and_booleans_do_not():
    assert [integer_as_text(value) for value in (8, True, "x", 1.5)] == ["8", True, "x", 1.5]
