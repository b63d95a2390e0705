"""Linear router of one layer of an expert graph, and the name under which checkpoints store its weight.

Shape suffixes: T tokens, D hidden width, E experts.
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

_STORED, _OPENED = ".mlp.router", ".mlp.router.weight"
# Regular expression of the stored name for ``from_pretrained``, and its replacement.
ROUTER_KEY_MAPPING = {r"\.mlp\.router(?!\.)": _OPENED}


class GraphRouter(nn.Module):
    """Linear map without bias from a token to the router logits of every expert of its layer.

    The logits are those of all experts: the walk masks experts that are not resident.

    Args:
        hidden_size: D.
        num_experts: E.
        layer_index: index of the decoder layer, for messages.

    Attributes:
        weight: ``[E, D]``.
    """

    def __init__(self, *, hidden_size: int, num_experts: int, layer_index: int = 0):
        super().__init__()
        self.layer_index = layer_index
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size))

    def forward(self, x_TD: Tensor) -> Tensor:
        """Router logits ``[T, E]``, at least in fp32: rounding must not decide which expert is visited.

        Raises:
            FloatingPointError: a logit is not finite.
        """
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        with torch.autocast(x_TD.device.type, enabled=False):
            logits_TE = F.linear(x_TD.to(wide), self.weight.to(wide))
        if not torch.isfinite(logits_TE).all():
            raise FloatingPointError(
                f"router scores of layer {self.layer_index} are not finite: its input or its router holds NaN or Inf"
            )
        return logits_TE


def stored_name(name: str) -> str:
    """Stored name of the parameter ``name`` of an opened graph: ``mlp.router`` for the weight of a router."""
    return name.removesuffix(_OPENED) + _STORED if name.endswith(_OPENED) else name


def opened_name(name: str) -> str:
    """Name in an opened graph of the stored tensor ``name``, the inverse of ``stored_name``."""
    return name.removesuffix(_STORED) + _OPENED if name.endswith(_STORED) else name
