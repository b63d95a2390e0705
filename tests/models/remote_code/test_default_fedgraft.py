"""Default output of experts that are not visited."""

import torch

from models.remote_code.default_fedgraft import DefaultOutput


def test_scales_with_the_share_of_unvisited_experts():
    default = DefaultOutput(hidden_size=2, rank=1, num_experts=4)
    with torch.no_grad():
        default.down.copy_(torch.tensor([[1.0, 0.0]]))
        default.up.copy_(torch.tensor([[2.0], [4.0]]))
        default.bias.copy_(torch.tensor([0.0, 1.0]))
    visits = torch.tensor([[0, 1, 2, 3], [2, -1, -1, -1], [1, 0, -1, -1]])
    output = default(torch.tensor([[3.0, 9.0]]).expand(3, -1), visits)
    # up @ down @ x + bias = (6, 13), times the shares 0, 3/4 and 1/2
    torch.testing.assert_close(output, torch.tensor([[0.0, 0.0], [4.5, 9.75], [3.0, 6.5]]))


def test_an_untrained_default_adds_nothing():
    default = DefaultOutput(hidden_size=4, rank=2, num_experts=4)
    torch.nn.init.normal_(default.down)
    assert not default(torch.randn(3, 4), torch.zeros(3, 1, dtype=torch.int64)).any()
