from __future__ import annotations

import numpy as np
import torch

from benchmarks.support.saliency_tools import plain_reap
from models.moe.saliency_collection import collect_saliency
from tests.support.tiny_graphs import random_ids
from tests.support.tiny_moes import tiny_moe


def test_the_plain_formula_leaves_padding_out():
    moe = tiny_moe("mixtral")
    token_mask = torch.ones(2, 10, dtype=torch.bool)
    token_mask[1, 4:] = False
    batches = [(random_ids(moe, 2, 10), token_mask)]
    np.testing.assert_allclose(
        plain_reap(moe, batches), collect_saliency(moe, batches).scores("reap"), rtol=1e-4
    )
