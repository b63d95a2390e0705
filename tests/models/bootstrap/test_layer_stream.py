"""Hidden states layer by layer, against the whole model."""

import torch

from models.bootstrap.calibration import visit_ffn_inputs
from models.bootstrap.layer_stream import LayerStream
from tests.support.tiny_graphs import random_ids, tiny_llama


@torch.no_grad()
def test_the_stream_gives_the_inputs_of_the_whole_model():
    dense = tiny_llama()
    ids, expected = random_ids(dense), {}
    visit_ffn_inputs(dense, ids, lambda layer, x: expected.update({layer: x.clone()}))
    stream = LayerStream(dense, ids, batch_size=1)
    for index, layer in enumerate(dense.model.layers):
        x_TD = stream.ffn_input(index)
        torch.testing.assert_close(x_TD, expected[index])
        stream.add(layer.mlp(x_TD))
