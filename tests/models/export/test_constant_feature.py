from __future__ import annotations

import numpy as np
import torch

from models.export.constant_feature import constant_features
from tests.support.tiny_graphs import ffn_inputs, graph_of, random_ids


def test_the_feature_is_the_least_squares_fit_of_one():
    graph = graph_of()
    ids = random_ids(graph)
    for layer, feature_D in enumerate(constant_features(graph, ids)):
        x_TD = ffn_inputs(graph, ids, layer).double().numpy()
        penalty = 1e-4 * (x_TD**2).sum(0).mean()
        expected = np.linalg.solve(x_TD.T @ x_TD + penalty * np.eye(32), x_TD.sum(0))
        np.testing.assert_allclose(feature_D.numpy(), expected, rtol=1e-3, atol=1e-4)


def test_a_constant_input_gives_one():
    graph = graph_of()
    x_TD = torch.ones(10, 32)
    for layer in graph.model.layers:  # every FFN receives ones
        layer.post_attention_layernorm.forward = lambda hidden: torch.ones_like(hidden)
    for feature_D in constant_features(graph, random_ids(graph)):
        torch.testing.assert_close(x_TD @ feature_D, torch.ones(10), rtol=1e-3, atol=1e-3)
