from __future__ import annotations

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from federated.updates.topk import top_entries


def by_sorting(magnitudes, count):
    """A stable sort by falling magnitude: the lowest position first on ties."""
    order = sorted(range(len(magnitudes)), key=lambda position: -magnitudes[position])
    return sorted(order[:count])


@settings(max_examples=150, deadline=None)
@given(st.lists(st.sampled_from([0.0, 1e-30, 0.25, 0.5, 1.0, 3.0]), max_size=60), st.integers(0, 60))
def test_the_same_entries_as_sorting_gives(magnitudes, count):
    count = min(count, len(magnitudes))
    assert top_entries(torch.tensor(magnitudes), count).tolist() == by_sorting(magnitudes, count)


@pytest.mark.parametrize("count", [0, 1, 37, 3000, 99_999, 100_000])
@pytest.mark.parametrize("kind", ["normal", "constant", "few", "clustered"])
def test_long_vectors(count, kind):
    generator = torch.Generator().manual_seed(0)
    normal = torch.randn(100_000, generator=generator).abs()
    vectors = {
        "normal": normal,
        "constant": torch.ones(100_000),
        "few": (4 * normal).round(),
        # The large entries are all where a sample at a fixed stride would not look.
        "clustered": torch.where(torch.arange(100_000) % 64 == 63, normal + 9, normal),
    }
    found = top_entries(vectors[kind], count)
    assert found.dtype == torch.int64
    assert found.tolist() == by_sorting(vectors[kind].tolist(), count)


@pytest.mark.parametrize("count", [-1, 4])
def test_more_than_there_are_is_an_error(count):
    with pytest.raises(ValueError, match="count"):
        top_entries(torch.ones(3), count)
