from __future__ import annotations

import math
import subprocess
import sys

import numpy as np
import pytest
import torch

from benchmarks.prune_merge import kept_by, measure, random_experts
from benchmarks.prune_peak import measure_pruning
from benchmarks.runner import peak_bytes
from benchmarks.saliency_tools import plain_reap
from benchmarks.small_moe import grow, train_moe
from experts.saliency import METRICS
from federated.blocks import Blocks
from models.llama_loader import load_dense
from models.perplexity import evaluate_loss
from models.saliency_collection import collect_saliency
from tests.tiny_graphs import logit_difference, random_ids
from tests.tiny_moes import saved_moe, tiny_moe


def test_a_quick_run_gives_every_figure():
    measured = measure(True, lambda stage, done, total: None)
    assert set(measured.figures) == {
        "ppl_frequency_over_reap_50",
        "ppl_random_over_reap_50",
        "ppl_prune_over_merge_25",
        "reap_formula_difference",
        "saliency_time_ratio",
        "prune_peak_over_checkpoint",
    }
    assert all(value is not None and math.isfinite(value) for value in measured.figures.values())
    assert measured.figures["reap_formula_difference"] < 1e-5
    for kind in ("mixture", "graph"):
        for run in measured.peers["runs"][kind]:
            for share in ("quarter", "half"):
                assert {*METRICS, "random", "merge"} <= set(run[share])


def test_a_grown_mixture_starts_as_its_llama_and_learns(tiny_llama_dir):
    moe = grow(str(tiny_llama_dir), experts=4, top_k=2, neurons=8, seed=0)
    ids = random_ids(moe, 8, 16)
    assert logit_difference(moe, load_dense(str(tiny_llama_dir)), ids) < 1e-5
    before, dense = (
        evaluate_loss(moe, ids, ids).mean,
        moe.model.layers[0].mlp.shared_expert.up_proj.weight.clone(),
    )
    told: list[int] = []
    train_moe(
        moe,
        Blocks(ids, ids),
        steps=20,
        batch_size=4,
        learning_rate=1e-2,
        autocast=False,
        seed=0,
        on_step=told.append,
    )
    assert evaluate_loss(moe, ids, ids).mean < before and told[-1] == 20 and not moe.training
    assert torch.equal(moe.model.layers[0].mlp.shared_expert.up_proj.weight, dense)


def test_the_plain_formula_leaves_padding_out():
    moe = tiny_moe("mixtral")
    counted = torch.ones(2, 10, dtype=torch.bool)
    counted[1, 4:] = False
    batches = [(random_ids(moe, 2, 10), counted)]
    np.testing.assert_allclose(
        plain_reap(moe, batches), collect_saliency(moe, batches).scores("reap"), rtol=1e-4
    )


@pytest.mark.parametrize("share", [2, 4])
def test_as_many_experts_stay_by_saliency_as_at_random(share):
    moe = tiny_moe("mixtral")
    saliency = collect_saliency(moe, [(random_ids(moe, 2, 10), torch.ones(2, 10, dtype=torch.bool))])
    for keep_map in (
        kept_by(saliency, "freq", share),
        random_experts(saliency, share, np.random.default_rng(0)),
    ):
        assert [len(np.unique(kept)) for kept in keep_map.values()] == [4 - 4 // share] * 2


def test_memory_of_pruning_is_measured(tmp_path, tiny_tokenizer):
    found = measure_pruning(saved_moe("mixtral", tmp_path, tiny_tokenizer), tmp_path / "out", 2)
    assert 0 < found["bytes_after"] < found["bytes_before"] and found["peak_bytes"] >= 0


def test_the_peak_of_a_process_is_not_that_of_the_one_that_started_it():
    held = np.ones(300 * 2**20, dtype=np.uint8)
    assert peak_bytes() > held.nbytes
    code = "from benchmarks.runner import peak_bytes; import numpy; print(peak_bytes())"
    alone = int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True).stdout)
    big = "import numpy; from benchmarks.runner import peak_bytes; x = numpy.ones(300 << 20, dtype='u1'); "
    grown = int(
        subprocess.run(
            [sys.executable, "-c", big + "print(peak_bytes())"], capture_output=True, text=True
        ).stdout
    )
    assert 250 * 2**20 < grown - alone < 350 * 2**20
