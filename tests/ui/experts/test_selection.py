from __future__ import annotations

import shlex

import pytest

from configs.errors import UserError
from experts.saliency.measures import save_saliency
from tests.support.saliency_samples import saliency_of_scores
from ui.experts.selection import SaliencyFile, SelectionForm, command_lines, marks, read_files, select

RANKED = saliency_of_scores([[4, 3, 2, 1], [1, 2, 3, 4]])
FILES = [SaliencyFile("a.npz", RANKED)]


def test_a_selection_is_that_of_the_rules():
    chosen = select(FILES, SelectionForm(metric="freq", n_prune=1))
    assert {layer: kept.tolist() for layer, kept in chosen.keep_map.items()} == {0: [0, 1, 2], 1: [1, 2, 3]}
    assert chosen.source["files"] == ["a.npz"]


def test_empty_fields_are_defaults():
    assert SelectionForm(n_prune=None, min_rank=" ", guard_top=None).rules() == SelectionForm().rules()
    assert SelectionForm().options() == ["--metric", "reap"]


def test_every_field_becomes_a_rule_and_an_option():
    form = SelectionForm("ean", "model_wide", "merge", 2, "1.5", "7", "1,3..4", 25)
    rules = form.rules()
    assert (rules.model_wide, rules.action, rules.n_prune) == (True, "merge", 2)
    assert (rules.min_rank, rules.max_rank, rules.ignored, rules.guard_top) == (1.5, 7.0, {1, 3, 4}, 25.0)
    assert shlex.join(form.options()) == (
        "--metric ean --selection-mode model_wide --action merge --n-prune 2 --min-rank 1.5 --max-rank 7 "
        "--ignore-experts 1,3..4 --guard-top 25.0"
    )


@pytest.mark.parametrize(
    ("fields", "message"),
    [
        ({"n_prune": 1.5}, "`n_prune` to be a whole number, got 1.5"),
        ({"n_prune": -1}, "`n_prune` of at least 0"),
        ({"max_rank": "x"}, "`max_rank` to be a number or empty, got 'x'"),
        ({"ignore_experts": "1;2"}, "expert ids such as"),
        ({"guard_top": 101}, "`guard_top` to be a percentage"),
    ],
)
def test_bad_fields_are_refused(fields, message):
    with pytest.raises(UserError, match=message):
        SelectionForm(**fields).rules()


def test_marks_tell_removed_exempt_shared_and_kept_experts_apart():
    form = SelectionForm(metric="freq", n_prune=1, ignore_experts="3", guard_top=25)
    chosen = select(FILES, form)
    assert ["".join(row) for row in marks(chosen, RANKED, form.rules())] == ["xkpx", "pkkx"]
    merged = SelectionForm(metric="freq", n_prune=1, action="merge")
    assert ["".join(row) for row in marks(select(FILES, merged), RANKED, merged.rules())] == ["kkkm", "mkkk"]


def test_commands_name_the_files_the_options_and_the_model():
    lines = command_lines(FILES, SelectionForm(action="merge", n_prune=1), "my model").splitlines()
    assert lines[0] == (
        "fedgraft experts select --saliency a.npz --metric reap --action merge --n-prune 1 --out selection"
    )
    assert lines[1] == (
        "fedgraft merge --model 'my model' --expert-list selection/filtered_experts.csv --data wikimix --out merged"
    )
    assert len(command_lines(FILES, SelectionForm(action="analyze"), None).splitlines()) == 1


def test_files_are_read_by_name(tmp_path):
    save_saliency(RANKED, tmp_path / "a.npz")
    (found,) = read_files([tmp_path / "a.npz"])
    assert found.name == "a.npz" and found.saliency.freq.tolist() == RANKED.freq.tolist()


def test_too_many_equal_malformed_or_foreign_files_are_refused(tmp_path):
    for name in ("a.npz", "deeper/a.npz"):
        (tmp_path / name).parent.mkdir(exist_ok=True)
        save_saliency(RANKED, tmp_path / name)
    save_saliency(saliency_of_scores([[1, 2]]), tmp_path / "small.npz")
    (tmp_path / "bad.npz").write_text("x")
    for paths, message in (
        ([], "1 to 4 saliency files, got 0"),
        ([f"{number}.npz" for number in range(5)], "got 5"),
        (["a.npz", "deeper/a.npz"], "different names"),
        (["bad.npz"], "^bad.npz: expected a saliency file"),
        (["a.npz", "small.npz"], "one model"),
    ):
        with pytest.raises(UserError, match=message):
            read_files([tmp_path / path for path in paths])
