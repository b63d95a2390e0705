from __future__ import annotations

import numpy as np
import pytest

from configs.errors import UserError
from experts.saliency.measures import ARRAYS, load_saliency, save_saliency
from experts.saliency.saliency_file import read_arrays
from tests.support.saliency_samples import random_saliency


@pytest.fixture
def arrays(tmp_path) -> dict[str, np.ndarray]:
    """What a good file of 2 layers and 3 experts holds."""
    save_saliency(random_saliency([3, 3]), tmp_path / "good.npz")
    with np.load(tmp_path / "good.npz") as archive:
        return dict(archive)


def load_changed(tmp_path, arrays: dict, **changes):
    np.savez(tmp_path / "changed.npz", **{**arrays, **changes})
    return load_saliency(tmp_path / "changed.npz")


@pytest.mark.parametrize("name", [*ARRAYS, "num_layers", "num_experts"])
def test_a_missing_key_is_named(tmp_path, arrays, name):
    del arrays[name]
    with pytest.raises(UserError, match=f"changed.npz: .*without {name};"):
        load_changed(tmp_path, arrays)


def test_layers_and_provenance_may_be_missing(tmp_path, arrays):
    del arrays["decoder_layers"], arrays["provenance"]
    loaded = load_changed(tmp_path, arrays)
    assert loaded.decoder_layers == [0, 1] and loaded.provenance == {}


def test_whole_numbers_are_taken(tmp_path, arrays):
    assert load_changed(tmp_path, arrays, freq=np.full((2, 3), 2)).freq.dtype == np.float64


@pytest.mark.parametrize(
    "changes, words",
    [
        ({"freq": np.ones((3, 2))}, r"freq of shape \(2, 3\)"),
        ({"freq": np.ones(6)}, r"freq of shape \(2, 3\)"),
        ({"num_layers": 3}, r"of shape \(3, 3\)"),
        ({"num_experts": 3.0}, "num_experts to be one whole number"),
        ({"num_layers": [2, 2]}, "num_layers to be one whole number"),
        ({"freq": np.full((2, 3), np.inf)}, "infinity"),
        ({"freq": np.full((2, 3), -1.0)}, "counts of at least 0"),
        ({"freq": np.full((2, 3), "many")}, "numbers"),
        ({"decoder_layers": [0.0, 1.0]}, "decoder_layers to be whole numbers"),
        ({"decoder_layers": [[0, 1]]}, "decoder_layers to be whole numbers"),
        ({"decoder_layers": [0]}, "2 ascending decoder layers"),
        ({"provenance": "{"}, "provenance"),
        ({"provenance": "[]"}, "provenance"),
        ({"provenance": ["{}", "{}"]}, "provenance"),
    ],
)
def test_values_that_cannot_be_are_refused(tmp_path, arrays, changes, words):
    with pytest.raises(UserError, match=words):
        load_changed(tmp_path, arrays, **changes)


def test_no_code_in_a_file_is_run(tmp_path, arrays):
    class Trap:
        def __reduce__(self):
            return (pytest.fail, ("the pickle was opened",))

    with pytest.raises(UserError, match="plain numbers"):
        load_changed(tmp_path, arrays, freq=np.asarray([Trap()], dtype=object))


def test_what_is_no_archive_is_refused(tmp_path, arrays):
    whole = (tmp_path / "good.npz").read_bytes()
    contents = {
        "text": b"layer,expert\n",
        "empty": b"",
        "cut": whole[: len(whole) // 2],
        "cut end": whole[:-30],
    }
    middle = len(whole) // 3
    contents["changed"] = whole[:middle] + bytes(40) + whole[middle + 40 :]
    for name, content in contents.items():
        (tmp_path / name).write_bytes(content)
        with pytest.raises(UserError, match=f"{name}: expected a saliency file"):
            load_saliency(tmp_path / name)
    np.save(tmp_path / "one.npy", np.ones(3))
    with pytest.raises(UserError, match="plain numbers"):
        read_arrays(tmp_path / "one.npy", ARRAYS)
    with pytest.raises(UserError, match="absent.npz: .*not there"):
        load_saliency(tmp_path / "absent.npz")
    with pytest.raises(UserError, match="plain numbers"):
        load_saliency(tmp_path)
