"""Fisher information of FFN outputs (K-FAC output factor), per layer."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from transformers import PreTrainedModel

from configs.errors import UserError

# Weight of the identity added to the Fisher information, both of mean diagonal 1. It regularizes the estimate, as the
# gradients of a few thousand tokens have little signal in most directions, and almost none for tokens of low entropy.
_ISOTROPIC = 1.0


def output_metrics(
    model: PreTrainedModel, input_ids: Tensor, *, seed: int = 0, batch_size: int = 2
) -> list[Tensor]:
    """Fisher information of every FFN's output, averaged over tokens, plus the identity.

    An error ``d`` of a layer's output raises the loss by about ``d' F d / 2`` nats a token, where ``F`` is the second
    moment of the gradient of the loss of labels drawn from the model (the output factor of K-FAC, arXiv:1503.05671).

    Args:
        model: a dense Llama.
        input_ids: calibration text, ``[N, S]``, S at least 2.
        seed: seed of the drawn labels.
        batch_size: blocks per backward pass.

    Returns:
        Per layer ``[D, D]``, fp32, positive definite: ``F`` scaled to a mean diagonal of 1, plus identity.

    Raises:
        UserError: logits that are NaN or infinite.
    """
    width = model.config.hidden_size
    moments = [torch.zeros(width, width, device=model.device) for _ in model.model.layers]
    generator = torch.Generator(model.device).manual_seed(seed)
    for ids in input_ids.split(batch_size):
        for moment, gradient in zip(moments, _gradients(model, ids.to(model.device), generator), strict=True):
            rows = gradient.flatten(0, -2).float()
            moment += rows.T @ rows
    return [_scaled(moment) for moment in moments]


def _scaled(moment: Tensor) -> Tensor:
    identity = torch.eye(len(moment), device=moment.device)
    size = moment.diagonal().mean()
    # Identity alone for a layer with zero gradient.
    return (moment / size if size > 0 else identity) + _ISOTROPIC * identity


@torch.enable_grad()
def _gradients(model: PreTrainedModel, ids: Tensor, generator: torch.Generator) -> Sequence[Tensor]:
    """Gradient of the summed loss with respect to each FFN's output, per layer ``[N, S, D]``."""
    outputs: list[Tensor] = []
    handles = [layer.mlp.register_forward_hook(_recording(outputs)) for layer in model.model.layers]
    try:
        logits = model(input_ids=ids, use_cache=False).logits[:, :-1].flatten(0, 1).float()
    finally:
        for handle in handles:
            handle.remove()
    if not torch.isfinite(logits).all():
        raise UserError(
            "expected finite logits on the calibration text, got NaN or Inf; check the checkpoint's weights"
        )
    labels = torch.multinomial(logits.detach().softmax(-1), 1, generator=generator).squeeze(-1)
    return torch.autograd.grad(F.cross_entropy(logits, labels, reduction="sum"), outputs)


def _recording(outputs: list[Tensor]) -> Callable[[nn.Module, tuple, Tensor], Tensor]:
    def record(_: nn.Module, __: tuple, output: Tensor) -> Tensor:
        # With frozen parameters the first layer's output would not require a gradient.
        output = output if output.requires_grad else output.detach().requires_grad_()
        outputs.append(output)
        return output

    return record
