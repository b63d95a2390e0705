from __future__ import annotations

import json

import numpy as np
import pytest

from configs.errors import UserError
from experts.saliency.expert_map import ExpertMap, flag_experts, load_expert_map, save_expert_map
from tests.support.saliency_samples import map_of, padded


def test_experts_at_or_above_the_threshold_are_flagged():
    flagged = flag_experts(padded([[0.1, 0.5, 0.9], [0.2]]), np.asarray([0.5, 0.3]))
    assert {layer: ids.tolist() for layer, ids in flagged.items()} == {0: [1, 2], 1: []}


def test_a_map_comes_back_equal(tmp_path):
    scores, thresholds = padded([[0.1, 0.5, 0.9], [0.2]]), np.asarray([0.5, 0.2])
    stored = ExpertMap("domain", scores, thresholds, flag_experts(scores, thresholds), {"model": "m"})
    save_expert_map(stored, tmp_path / "map.json", statistics={"0": {"1": {"difference": np.float64(0.3)}}})
    loaded = load_expert_map(tmp_path / "map.json")
    np.testing.assert_array_equal(loaded.scores, scores)
    np.testing.assert_array_equal(loaded.thresholds, thresholds)
    assert loaded.kind == "domain" and loaded.provenance == {"model": "m"}
    assert {layer: ids.tolist() for layer, ids in loaded.flagged.items()} == {0: [1, 2], 1: [0]}
    written = json.loads((tmp_path / "map.json").read_text())
    assert written["version"] == "1.0" and written["statistics"] == {"0": {"1": {"difference": 0.3}}}
    assert written["scores"][1] == [0.2, None, None]


def test_the_mask_and_the_shape_follow_the_flags():
    made = map_of("safety", [3, 2], {0: [2], 1: [0]})
    assert made.mask.tolist() == [[False, False, True], [True, False, False]]
    assert made.experts_per_layer == [3, 2]


def test_layers_without_flags_may_be_missing():
    made = ExpertMap("safety", np.ones((2, 2)), np.ones(2), {1: np.asarray([0])})
    assert made.mask.tolist() == [[False, False], [True, False]]


@pytest.mark.parametrize(
    "change, words",
    [
        ({"kind": "danger"}, "safety or domain, got 'danger'"),
        ({"scores": [1.0]}, "scores"),
        ({"scores": [[1.0], [1.0, 2.0]]}, "malformed"),
        ({"scores": "many"}, "malformed"),
        ({"thresholds": [1.0]}, "threshold per layer"),
        ({"flagged": {"2": [0]}}, "layers 0 to 1, got layer 2"),
        ({"flagged": {"0": [3]}}, "layer 0 to be 0 to 2, got 3"),
        ({"flagged": {"1": [2]}}, "layer 1 to be 0 to 1, got 2"),
        ({"flagged": {"0": [-1]}}, "got -1"),
        ({"flagged": {"0": [1.7]}}, "lists of expert ids"),
        ({"flagged": {"0": [True]}}, "lists of expert ids"),
        ({"flagged": {"0": 1}}, "lists of expert ids"),
        ({"flagged": {"first": [1]}}, "malformed"),
        ({"flagged": [[1]]}, "malformed"),
        ({"flagged": {"0": [2**70]}}, "malformed"),
        ({"provenance": 3}, "malformed"),
    ],
)
def test_a_malformed_map_is_refused_in_one_error(tmp_path, change, words):
    path = tmp_path / "map.json"
    save_expert_map(map_of("safety", [3, 2], {0: [2]}), path)
    path.write_text(json.dumps({**json.loads(path.read_text()), **change}))
    with pytest.raises(UserError, match=words) as error:
        load_expert_map(path)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("name", ["kind", "scores", "thresholds", "flagged"])
def test_a_missing_field_is_named(tmp_path, name):
    path = tmp_path / "map.json"
    save_expert_map(map_of("safety", [3, 2], {}), path)
    value = json.loads(path.read_text())
    del value[name]
    path.write_text(json.dumps(value))
    with pytest.raises(UserError, match=f"without {name};"):
        load_expert_map(path)


def test_an_unknown_version_warns(tmp_path):
    path = tmp_path / "map.json"
    save_expert_map(map_of("safety", [3, 2], {0: [2]}), path)
    path.write_text(path.read_text().replace('"1.0"', '"9"'))
    with pytest.warns(UserWarning, match="version '9'"):
        assert load_expert_map(path).mask.sum() == 1
