"""TensorBoard's own reader finds in the event files what the run said."""

from __future__ import annotations

import io
import math
from dataclasses import replace

import numpy as np
import pytest
from PIL import Image
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from server.reporting.run_log import RewireRecord
from server.reporting.tensorboard_log import SEPARATOR_COLOR, TensorBoardLog, edits_table, layer_grid
from tests.server.reporting.test_run_log import CLIENT, EDIT, ROUND


@pytest.fixture
def read_back(tmp_path):
    """A function that runs an action on a TensorBoardLog and returns TensorBoard's view of the result."""

    def read(action) -> EventAccumulator:
        log = TensorBoardLog(tmp_path)
        action(log)
        log.close()
        events = EventAccumulator(str(tmp_path / "tensorboard"), size_guidance={"images": 0, "tensors": 0})
        return events.Reload()

    return read


def scalars(events: EventAccumulator, tag: str) -> list:
    return [(event.step, pytest.approx(event.value)) for event in events.Scalars(tag)]


def test_curves_per_client_and_overall(read_back):
    def two_rounds(log):
        log.round(replace(ROUND, epsilon=1.5, delta=1e-5))
        log.round(replace(ROUND, round=2, perplexity=7.0, clients=[replace(CLIENT, perplexity=math.nan)]))

    events = read_back(two_rounds)
    assert scalars(events, "perplexity/overall") == [(1, 8.0), (2, 7.0)]
    assert scalars(events, "perplexity/recipes") == [(1, 9.5)]  # no point where the value is not a number
    assert scalars(events, "privacy/epsilon") == [(1, 1.5)]
    assert scalars(events, "loss/prose") == [(1, 4.0)]
    assert scalars(events, "loss/overall") == [(1, 3.5), (2, 2.0)]
    assert scalars(events, "density/overall") == [(1, 0.05), (2, 0.05)]
    assert scalars(events, "edges/layer_01") == [(1, 5), (2, 5)]
    assert scalars(events, "edges/total") == [(1, 11), (2, 11)]
    assert scalars(events, "bytes/up") == [(1, 300), (2, 300)]
    assert scalars(events, "bytes_cumulative/down") == [(1, 80), (2, 160)]
    assert scalars(events, "bytes_cumulative/up_dense") == [(1, 9000), (2, 18000)]


def test_the_start_of_a_client_is_a_curve(read_back):
    events = read_back(lambda log: log.round(replace(ROUND, clients=[replace(CLIENT, start_seconds=2.5)])))
    assert scalars(events, "start_seconds/recipes") == [(1, 2.5)]


def test_visits_of_attached_experts_are_curves(read_back):
    attached = [{"layer": 1, "id": 9, "visits_over_mean": 0.5}]
    events = read_back(lambda log: log.round(replace(ROUND, attached=attached)))
    assert scalars(events, "attached_visits/layer_01_9") == [(1, 0.5)]


def test_statistics_of_drift_are_curves(read_back):
    client = replace(CLIENT, drift_loss=0.75, drift_routing=0.25, drifted=True)
    events = read_back(
        lambda log: log.round(replace(ROUND, clients=[client], drifted=True, drift_layers=[0.5, 0.125]))
    )
    assert scalars(events, "drift/overall") == [(1, 1.0)]
    assert scalars(events, "drift_loss/recipes") == [(1, 0.75)]
    assert scalars(events, "drift_routing/recipes") == [(1, 0.25)]
    assert scalars(events, "drift_routing/layer_01") == [(1, 0.125)]


def test_a_new_log_replaces_an_earlier_one_and_a_resumed_one_goes_on(read_back, tmp_path):
    read_back(lambda log: log.round(ROUND))
    resumed = TensorBoardLog(tmp_path, resumed=1)
    resumed.round(replace(ROUND, round=2))
    resumed.close()
    assert len(list((tmp_path / "tensorboard").iterdir())) == 2
    events = read_back(lambda log: log.round(replace(ROUND, round=3)))
    assert scalars(events, "perplexity/overall") == [(3, 8.0)]


def text(events: EventAccumulator, tag: str) -> str:
    return events.Tensors(f"{tag}/text_summary")[0].tensor_proto.string_val[0].decode()


def test_edits_and_refusals_are_readable_text(read_back):
    def merge(log):
        log.rewire(RewireRecord(round=3, rho_max=4, edits=[EDIT], loss_before=2.0, loss_after=1.5))
        log.round(replace(ROUND, clients=[replace(CLIENT, refused="graph version 1, expected 2")]))

    events = read_back(merge)
    assert "| add_edge | 0 | 1 | 2 | demand 31 |" in text(events, "graph/edits")
    assert text(events, "refused/recipes") == "graph version 1, expected 2"
    assert scalars(events, "edges/edits") == [(3, 1)]
    assert scalars(events, "merge/loss_after") == [(3, 1.5)]
    assert "merge/gamma_hat" not in events.Tags()["scalars"]


def test_masks_come_out_as_a_picture_with_visible_entries(read_back):
    masks = np.zeros((3, 16, 16), dtype=bool)
    masks[1, 2, 5] = True
    event = read_back(lambda log: log.masks("global", masks, 4)).Images("masks/global")[0]
    picture = np.asarray(Image.open(io.BytesIO(event.encoded_image_string)).convert("L"))
    white = np.argwhere(picture == 255)
    assert event.step == 4
    assert len(white) == 15 * 15  # one entry, upscaled without smoothing
    assert (np.ptp(white, axis=0) == 14).all()
    assert white[0][1] > picture.shape[1] / 2  # layer 1 is the right one of the first row


def test_usage_gives_a_picture_and_one_bar_per_expert(read_back):
    usage = np.zeros((1, 4, 4))
    usage[0, 0, 0], usage[0, 0, 2], usage[0, 1, 2] = 10, 4, 1
    events = read_back(lambda log: log.usage(usage, 2))
    bars = events.Histograms("tokens_per_expert/layer_00")[0]
    assert bars.step == 2
    assert (bars.histogram_value.num, bars.histogram_value.max) == (15, 3)
    assert list(bars.histogram_value.bucket) == [10, 0, 5, 0]
    assert list(bars.histogram_value.bucket_limit) == [0.5, 1.5, 2.5, 3.5]
    assert events.Tags()["images"] == ["usage/traversals"]


def test_unused_experts_do_not_divide_by_zero(read_back):
    events = read_back(lambda log: log.usage(np.zeros((2, 3, 3)), 1))
    assert events.Histograms("tokens_per_expert/layer_01")[0].histogram_value.num == 0


def test_edits_table_escapes_bars_and_says_when_there_is_nothing():
    retired = EDIT | {"op": "retire_expert", "q": None, "reason": "usage|low"}
    table = edits_table(RewireRecord(round=1, rho_max=2, edits=[retired]))
    assert table.splitlines()[2] == "| retire_expert | 0 | 1 |  | usage\\|low |"
    assert edits_table(RewireRecord(round=1, rho_max=2, edits=[])) == "round 1: no edit (at most 2 allowed)"


def test_layer_grid_places_layers_row_by_row_between_separators():
    matrices = np.stack([np.full((2, 2), value, dtype=np.float32) for value in (0.2, 0.4, 0.6)])
    picture = layer_grid(matrices)
    assert picture.shape == (2 * 248 + 8, 2 * 248 + 8, 3)
    centers = [picture[row, column, 0] for row, column in ((128, 128), (128, 376), (376, 128))]
    assert centers == pytest.approx([0.2, 0.4, 0.6])
    for row, column in ((0, 0), (128, 250), (376, 376)):
        assert picture[row, column] == pytest.approx(SEPARATOR_COLOR)
