from __future__ import annotations

import pytest

from configs.errors import UserError
from experts.saliency.expert_map import save_expert_map
from experts.selection.rules import SelectionRules
from scripts.shared.expert_options import selection_of
from tests.support.saliency_samples import map_of


def test_maps_are_read_and_ids_parsed(tmp_path):
    save_expert_map(map_of("safety", [3], {0: [1]}), tmp_path / "safety.json")
    save_expert_map(map_of("domain", [3], {0: [2]}), tmp_path / "domain.json")
    selection = selection_of(
        safety_map=tmp_path / "safety.json",
        domain_map=tmp_path / "domain.json",
        ignore_experts="0..1",
        safety_mode="target",
        n_prune=2,
    )
    assert selection.safety.mask.tolist() == [[False, True, False]]
    assert selection.domain.mask.tolist() == [[False, False, True]]
    assert (selection.ignored, selection.safety_mode, selection.n_prune) == ({0, 1}, "target", 2)


def test_nothing_asked_is_the_default_selection():
    assert selection_of() == SelectionRules()


def test_conflicts_are_refused():
    with pytest.raises(UserError, match="--safety-map"):
        selection_of(safety_mode="target")
