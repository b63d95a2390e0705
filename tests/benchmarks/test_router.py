from __future__ import annotations

import math

import pytest
import torch

from benchmarks.router import (
    elimination_selection,
    gap_closed,
    measure,
    mixed_text,
    perplexity_table,
    seed_tables,
    summary,
)
from benchmarks.support.material import DEMO_MODEL
from models.bootstrap.calibration import Calibration
from models.bootstrap.router_init import elimination_places, metric_root
from models.bootstrap.selection_report import linear_selection
from models.runtime.perplexity import evaluate_loss
from tests.conftest import tiny_llama
from tests.support.tiny_graphs import ffn_inputs, random_ids

NAMES = {"router", "centroid", "static", "oracle", "random", "elimination"}
MEMBERS = [torch.arange(64).view(8, 8)] * 2


def test_a_quick_run_measures_every_figure():
    steps = []
    measured = measure(True, lambda *step: steps.append(step))
    assert set(measured.figures) == {"gap_closed", "gap_closed_sampled", "static_over_router"}
    assert all(math.isfinite(value) for value in measured.figures.values())
    assert measured.figures["static_over_router"] > 1 and steps == [("seeds", 1, 1)]
    for table in (measured.peers["mean"]["text"], measured.peers["seeds"][0]["sampled"]):
        assert {share: set(row) for share, row in table.items()} == dict.fromkeys(("75", "50", "25"), NAMES)


def test_gap_closed_is_0_at_the_centroid_and_1_at_the_oracle():
    assert gap_closed({"router": 90, "centroid": 90, "oracle": 80}) == 0
    assert gap_closed({"router": 80, "centroid": 90, "oracle": 80}) == 1
    assert gap_closed({"router": 10, "centroid": 100, "oracle": 1}) == pytest.approx(0.5)


def test_the_summary_averages_seeds():
    def run(router):
        row = dict.fromkeys(NAMES, 100.0) | {"router": router, "oracle": 10.0, "static": 200.0}
        return {"dense": 5.0, **{kind: {"50": row} for kind in ("text", "sampled")}}

    measured = summary([run(10.0), run(40.0)])
    gaps = [1.0, (math.log(100) - math.log(40)) / math.log(10)]
    assert measured.figures["gap_closed"] == pytest.approx(sum(gaps) / 2)
    assert measured.figures["static_over_router"] == pytest.approx((20 + 5) / 2)
    assert measured.peers["mean"]["text"]["50"]["router"] == pytest.approx(20)
    low, high = measured.peers["intervals_95"]["gap_closed"]
    assert low < sum(gaps) / 2 < high and set(measured.notes) == set(measured.figures)


def test_text_of_every_domain_and_split():
    text, labels = mixed_text(str(DEMO_MODEL), "train", 0, quick=True)
    held_out, _ = mixed_text(str(DEMO_MODEL), "valid", 0, quick=True)
    assert text.shape == labels.shape and text.shape[1] == 64 and not torch.equal(text, held_out)


@torch.no_grad()
def test_elimination_keeps_the_experts_dropped_last():
    dense = tiny_llama()
    measured = Calibration(dense, random_ids(dense, 4, 16))
    x, mlp = ffn_inputs(dense, measured.input_ids, 1), dense.model.layers[1].mlp
    places = elimination_places(mlp, x, MEMBERS[1], metric_root(measured.metrics[1]))
    assert torch.equal(elimination_selection(measured, MEMBERS).scores[1](mlp, x), -places)


def test_a_table_has_a_row_per_share_and_the_model_is_restored():
    dense, held_out = tiny_llama(), (random_ids(tiny_llama(), 2, 16),) * 2
    routers = [torch.randn(8, 32, generator=torch.Generator().manual_seed(seed)) for seed in range(2)]
    before = evaluate_loss(dense, *held_out).nll
    table = perplexity_table(dense, {"noise": linear_selection(MEMBERS, routers)}, held_out)
    assert [set(row) for row in table.values()] == [{"noise"}] * 3
    assert len({row["noise"] for row in table.values()}) == 3
    assert evaluate_loss(dense, *held_out).nll == before


def test_one_seed_gives_the_same_tables_again():
    dense, ids = tiny_llama(), random_ids(tiny_llama(), 8, 32)
    one, same = (seed_tables(dense, ids, (ids, ids), 3) for _ in range(2))
    assert one == same and one["text"] != one["sampled"]
