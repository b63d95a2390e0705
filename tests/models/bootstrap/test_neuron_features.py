"""The expert of each neuron, by hand."""

import torch

from models.bootstrap.neuron_features import experts_of_neurons


def test_each_neuron_has_the_expert_that_lists_it():
    assert experts_of_neurons(torch.tensor([[3, 0], [1, 2]])).tolist() == [0, 1, 1, 0]
