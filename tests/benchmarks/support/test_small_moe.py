from __future__ import annotations

import torch

from benchmarks.support.small_moe import grow, train_moe
from federated.data.blocks import Blocks
from models.checkpoints.load import load_dense
from models.runtime.perplexity import evaluate_loss
from tests.support.tiny_graphs import logit_difference, random_ids


def test_a_grown_mixture_starts_as_its_llama_and_learns(tiny_llama_dir):
    moe = grow(str(tiny_llama_dir), experts=4, top_k=2, neurons=8, seed=0)
    ids = random_ids(moe, 8, 16)
    assert logit_difference(moe, load_dense(str(tiny_llama_dir)), ids) < 1e-5
    before, dense = (
        evaluate_loss(moe, ids, ids).mean,
        moe.model.layers[0].mlp.shared_expert.up_proj.weight.clone(),
    )
    reported: list[int] = []
    train_moe(
        moe,
        Blocks(ids, ids),
        steps=20,
        batch_size=4,
        learning_rate=1e-2,
        autocast=False,
        seed=0,
        on_step=reported.append,
    )
    assert evaluate_loss(moe, ids, ids).mean < before and reported[-1] == 20 and not moe.training
    assert torch.equal(moe.model.layers[0].mlp.shared_expert.up_proj.weight, dense)
