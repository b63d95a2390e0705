from __future__ import annotations

import dataclasses

import numpy as np
import pytest

from configs.choices import Metric
from configs.errors import UserError
from experts.saliency.measures import (
    ARRAYS,
    Saliency,
    add_saliency,
    check_same_model,
    load_saliency,
    save_saliency,
)
from tests.support.saliency_samples import padded, random_saliency


def test_the_scores_are_means_for_reap_and_sums_for_the_others():
    saliency = random_saliency([4, 3])
    with np.errstate(invalid="ignore"):
        np.testing.assert_array_equal(saliency.scores("reap"), saliency.reap_sum / saliency.reap_count)
    np.testing.assert_array_equal(saliency.scores("ean"), saliency.ean_sum)
    np.testing.assert_array_equal(saliency.scores("freq"), saliency.freq)
    np.testing.assert_array_equal(saliency.scores("weighted_freq"), saliency.weighted_freq_sum)


@pytest.mark.parametrize("metric", Metric)
def test_an_expert_never_routed_to_scores_zero_and_an_absent_one_nothing(metric):
    zeros = padded([[0.0, 0.0], [0.0]])
    saliency = Saliency(zeros, zeros, zeros, zeros, zeros, [0, 1])
    np.testing.assert_array_equal(saliency.scores(metric), zeros)


def test_scores_are_a_copy():
    saliency = random_saliency([3])
    saliency.scores("freq")[:] = -1
    assert (saliency.freq > 0).all()


def test_shapes_are_told_with_layers_of_different_sizes():
    saliency = random_saliency([4, 2, 3])
    assert (saliency.num_layers, saliency.num_experts, saliency.experts_per_layer) == (3, 4, [4, 2, 3])
    assert saliency.present.sum() == 9 and saliency.decoder_layers == [1, 3, 5]


def test_an_unknown_metric_is_refused_with_the_nearest():
    with pytest.raises(UserError, match="`metric` to be reap, ean.*'reaps'.*did you mean 'reap'"):
        random_saliency([2]).scores("reaps")


def test_a_file_holds_exactly_the_promised_keys_and_comes_back_equal(tmp_path):
    saliency = random_saliency([4, 3], model="m", datasets=["a", "b"], tokens=7)
    save_saliency(saliency, tmp_path / "deep" / "saliency.npz")
    with np.load(tmp_path / "deep" / "saliency.npz", allow_pickle=False) as archive:
        assert set(archive.files) == {*ARRAYS, "num_layers", "num_experts", "decoder_layers", "provenance"}
        assert all(archive[name].dtype == np.float64 and archive[name].shape == (2, 4) for name in ARRAYS)
        assert (int(archive["num_layers"]), int(archive["num_experts"])) == (2, 4)
    loaded = load_saliency(tmp_path / "deep" / "saliency.npz")
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(loaded, name), getattr(saliency, name))
    assert loaded.decoder_layers == [1, 3] and loaded.provenance == saliency.provenance


def test_a_failing_write_leaves_the_file_as_it_was(tmp_path, monkeypatch):
    path = tmp_path / "saliency.npz"
    save_saliency(random_saliency([2], seed=1), path)
    before = path.read_bytes()

    def failing(file, **arrays):
        file.write(b"half")
        raise OSError("disk full")

    monkeypatch.setattr(np, "savez_compressed", failing)
    with pytest.raises(OSError, match="disk full"):
        save_saliency(random_saliency([2], seed=2), path)
    assert path.read_bytes() == before and [one.name for one in tmp_path.iterdir()] == ["saliency.npz"]


def test_the_sums_of_two_texts_are_those_of_both_in_one_go():
    first = random_saliency([4, 3], 1, model="m", datasets=["a"], tokens=5, collected="x")
    second = random_saliency([4, 3], 2, model="m", datasets=["b", "a"], tokens=6, collected="y")
    both = add_saliency([first, second])
    for name in ARRAYS:
        np.testing.assert_array_equal(getattr(both, name), getattr(first, name) + getattr(second, name))
    expected = (first.reap_sum + second.reap_sum) / (first.reap_count + second.reap_count)
    np.testing.assert_allclose(both.scores("reap"), expected)
    assert both.provenance == {"model": "m", "datasets": ["a", "b"], "tokens": 11}
    assert both.decoder_layers == first.decoder_layers


def test_one_part_stays_as_it_is():
    part = random_saliency([3], tokens=4)
    np.testing.assert_array_equal(add_saliency([part]).reap_sum, part.reap_sum)
    assert add_saliency([part]).provenance == {"tokens": 4}


def test_saliency_of_different_models_is_never_added():
    first = random_saliency([4, 3], model_fingerprint="one")
    others = {
        "experts per layer": random_saliency([4, 4]),
        "decoder layers": dataclasses.replace(first, decoder_layers=[0, 1]),
        "model fingerprint": random_saliency([4, 3], model_fingerprint="two"),
    }
    for what, other in others.items():
        with pytest.raises(UserError, match=f"one model.*{what} in file 2"):
            add_saliency([first, other])
    check_same_model([first, random_saliency([4, 3])])
    with pytest.raises(UserError, match="at least one"):
        add_saliency([])


@pytest.mark.parametrize(
    "name, value, words",
    [
        ("freq", [[1.0, -1.0]], "freq, got one below in layer 0"),
        ("reap_count", [[1.0, -1.0]], "counts of at least 0 in reap_count"),
        ("ean_sum", [[1.0, np.inf]], "infinity in layer 0"),
        ("ean_sum", [[1.0, 1.0, 1.0]], r"ean_sum of the shape of freq \(1, 2\)"),
        ("ean_sum", [1.0, 1.0], r"\[layers, experts\]"),
        ("ean_sum", [["a", "b"]], "to be numbers"),
        ("ean_sum", [[1.0, np.nan]], "NaN in ean_sum exactly where freq"),
        ("decoder_layers", [0, 1], "1 ascending decoder layers"),
        ("decoder_layers", [-1], "ascending decoder layers"),
    ],
)
def test_what_cannot_be_saliency_is_refused(name, value, words):
    fields = {one: np.ones((1, 2)) for one in ARRAYS} | {"decoder_layers": [0]}
    Saliency(**fields)
    with pytest.raises(UserError, match=words):
        Saliency(**fields | {name: value})


def test_absent_experts_stand_behind_the_others():
    for row in ([np.nan, 1.0], [np.nan, np.nan]):
        array = np.asarray([row, [1.0, 1.0]])
        with pytest.raises(UserError, match="experts first and NaN only behind"):
            Saliency(array, array, array, array, array, [0, 1])


def test_decoder_layers_ascend():
    array = np.ones((2, 2))
    with pytest.raises(UserError, match="ascending"):
        Saliency(array, array, array, array, array, [1, 1])


def test_shared_experts_go_through_files_and_sums(tmp_path):
    saliency = dataclasses.replace(random_saliency([4, 3]), num_shared=(2, 0))
    save_saliency(saliency, tmp_path / "s.npz")
    loaded = load_saliency(tmp_path / "s.npz")
    assert loaded.num_shared == (2, 0) == add_saliency([loaded, saliency]).num_shared
    assert loaded.routed.tolist() == [[False, False, True, True], [True, True, True, False]]
    for wrong in ((2,), (5, 0), (2, -1)):
        with pytest.raises(UserError, match="shared experts among the experts per layer"):
            dataclasses.replace(saliency, num_shared=wrong)
