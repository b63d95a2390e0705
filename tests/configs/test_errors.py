from __future__ import annotations

from configs.errors import UserError, first_line, name_fields, nearest


def test_the_closest_known_word_is_suggested():
    assert nearest("local-step", ["seed", "local-steps", "walk"]) == " (did you mean 'local-steps'?)"
    assert nearest("rho_max", ["rho-max", "merge-every"]) == " (did you mean 'rho-max'?)"


def test_nothing_is_suggested_where_nothing_is_close():
    assert nearest("zebra", ["seed", "walk"]) == ""
    assert nearest("seed", []) == ""
    assert nearest("", ["seed"]) == ""


def test_known_words_may_be_any_iterable():
    assert nearest("wlak", (word for word in ("walk", "seed"))) == " (did you mean 'walk'?)"


def test_a_user_error_is_a_value_error_with_its_message():
    assert (
        isinstance(UserError("x"), ValueError) and str(UserError("expected x, got y")) == "expected x, got y"
    )


def test_a_library_s_error_in_one_line():
    assert first_line(ValueError("one\ntwo")) == "one"
    assert first_line(KeyError()) == "KeyError"


def test_fields_in_backquotes_take_the_name_of_the_interface():
    message = "expected `n_prune` with `saliency`; make one with `fedgraft bootstrap --out DIR` in `A B`"
    assert name_fields(message, str.upper) == (
        "expected N_PRUNE with SALIENCY; make one with `fedgraft bootstrap --out DIR` in `A B`"
    )
    assert name_fields("no field", str.upper) == "no field"
