from __future__ import annotations

import re

from tests.support.saliency_samples import saliency_of_scores
from tests.support.tiny_moes import saved_moe
from ui.experts.selection import SaliencyFile, SelectionForm, select
from ui.experts.statistics import layer_table, size_preview, totals

RANKED = saliency_of_scores([[4, 3, 2, 1], [1, 2, 3, 4]])


def chosen(**fields):
    return select([SaliencyFile("a.npz", RANKED)], SelectionForm(metric="freq", **fields))


def test_the_table_lists_removed_experts_worst_first():
    cells = re.findall(r"<td[^>]*>([^<]*)</td>", layer_table(chosen(n_prune=2), RANKED))
    assert cells == ["0", "0", "4", "2", "2", "3, 2", "1", "1", "4", "2", "2", "0, 1"]


def test_long_lists_are_cut():
    saliency = saliency_of_scores([list(range(40))])
    found = select([SaliencyFile("a", saliency)], SelectionForm(metric="freq", n_prune=30))
    assert "22, 23 …</td>" in layer_table(found, saliency)


def test_totals_say_that_nothing_is_removed():
    assert totals(chosen(n_prune=1), "merge") == "2 layers, 6 experts kept, 2 merged."
    assert "Nothing to remove yet" in totals(chosen(), "prune")
    assert totals(chosen(action="analyze"), "analyze") == "2 layers, 8 experts kept, 0 removed."


def test_the_size_is_that_of_the_pruned_checkpoint(tmp_path, tiny_tokenizer):
    model = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    expert, router, others = 3 * 32 * 24, 32, 2 * 64 * 32 + 32 + 2 * (2 * 32 * 32 + 2 * 32 * 16 + 2 * 32)
    before, after = (others + 2 * number * (expert + router) for number in (4, 3))
    text = size_preview(model, chosen(n_prune=1))
    assert f"{before / 1e3:.2f} k → {after / 1e3:.2f} k parameters ({after / before:.1%})" in text


def test_an_unknown_size_has_its_reason(tmp_path, tiny_tokenizer):
    assert size_preview(None, chosen()) == "Size: choose a model to see it."
    model = saved_moe("mixtral", tmp_path, tiny_tokenizer)
    uneven = chosen(n_prune=1, selection_mode="model_wide")
    assert size_preview(model, uneven).startswith("Size: unknown: expected")
