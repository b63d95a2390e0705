"""Calibration text of a dense Llama, and the inputs and activations of its FFN layers on it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor, nn
from transformers import PreTrainedModel

from models.bootstrap.fisher import output_metrics

# Tokens of the activation profiles of neurons.
PROFILE_TOKENS = 512


@torch.no_grad()
def sample_text(
    model: PreTrainedModel, *, blocks: int, block_size: int, seed: int, batch_size: int = 64
) -> Tensor:
    """Sample token blocks ``[blocks, block_size]`` from the model at temperature 1, starting from BOS.

    At most ``batch_size`` blocks are sampled at once. The global random state does not change.
    """
    bos = model.config.bos_token_id if model.config.bos_token_id is not None else 0
    starts = torch.full((blocks, 1), bos, device=model.device).split(batch_size)
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        return torch.cat([_sample(model, start, block_size - 1, bos) for start in starts])


def _sample(model: PreTrainedModel, start: Tensor, new_tokens: int, padding: int) -> Tensor:
    return model.generate(
        start,
        attention_mask=torch.ones_like(start),
        do_sample=True,
        top_k=0,
        top_p=1.0,
        temperature=1.0,
        min_new_tokens=new_tokens,
        max_new_tokens=new_tokens,
        pad_token_id=padding,
    )


@torch.no_grad()
def visit_ffn_inputs(
    model: PreTrainedModel, input_ids: Tensor, visit: Callable[[int, Tensor], None], *, batch_size: int = 16
) -> None:
    """Run ``input_ids [N, S]`` through the model and call ``visit(layer, x [T, D])`` with the input of each FFN."""
    handles = [
        layer.mlp.register_forward_pre_hook(_passing_on(visit, index))
        for index, layer in enumerate(model.model.layers)
    ]
    try:
        for ids in input_ids.split(batch_size):
            model.model(input_ids=ids.to(model.device), use_cache=False)
    finally:
        for handle in handles:
            handle.remove()


def _passing_on(visit: Callable[[int, Tensor], None], layer: int) -> Callable[[nn.Module, tuple], None]:
    return lambda _, inputs: visit(layer, inputs[0].flatten(0, -2))


def hidden_activations(mlp: nn.Module, x_TD: Tensor) -> Tensor:
    """Activations ``[T, m]`` of a gated FFN's neurons, before the down projection."""
    return mlp.act_fn(mlp.gate_proj(x_TD)) * mlp.up_proj(x_TD)


def contributions(mlp: nn.Module, x_TD: Tensor) -> Tensor:
    """L2 norm of each neuron's contribution to the output, ``[T, m]``, for FFN inputs ``[T, D]``."""
    return neuron_contributions(mlp, hidden_activations(mlp, x_TD))


def neuron_contributions(mlp: nn.Module, hidden_Tm: Tensor) -> Tensor:
    """The same from the activations of the neurons: ``|h_i| * norm(w_down_i)``."""
    return (hidden_Tm.abs() * mlp.down_proj.weight.norm(dim=0)).float()


@dataclass
class NeuronStatistics:
    """Per-layer statistics of the FFN neurons over calibration text.

    Attributes:
        mean_contribution: per layer ``[m]``, contribution averaged over tokens.
        mean_activation: per layer ``[m]``, ``|h|`` averaged over tokens.
        profiles: per layer ``[m, P]``, activations on the first P tokens; P may be 0.
    """

    mean_contribution: list[Tensor]
    mean_activation: list[Tensor]
    profiles: list[Tensor]


def neuron_statistics(
    model: PreTrainedModel, input_ids: Tensor, *, profile_tokens: int = PROFILE_TOKENS
) -> NeuronStatistics:
    """Compute ``NeuronStatistics`` of a dense Llama over ``input_ids [N, S]``."""
    layers = [layer.mlp for layer in model.model.layers]
    scale = [mlp.down_proj.weight.float().norm(dim=0) for mlp in layers]
    sums = [torch.zeros(len(norm)) for norm in scale]
    profiles: list[list[Tensor]] = [[] for _ in layers]

    def visit(layer: int, x_TD: Tensor) -> None:
        hidden = hidden_activations(layers[layer], x_TD).float().cpu()
        sums[layer] += hidden.abs().sum(0)
        wanted = profile_tokens - sum(len(part) for part in profiles[layer])
        # A copy: a slice would keep the activations of the whole batch in memory.
        profiles[layer].append(hidden[: max(wanted, 0)].clone())

    visit_ffn_inputs(model, input_ids, visit)
    means = [total / input_ids.numel() for total in sums]
    return NeuronStatistics(
        mean_contribution=[mean * norm.cpu() for mean, norm in zip(means, scale, strict=True)],
        mean_activation=means,
        profiles=[torch.cat(parts).T.contiguous() for parts in profiles],
    )


@dataclass(frozen=True, eq=False)
class Calibration:
    """Statistics of a dense Llama on its calibration text, each computed once on first use.

    Attributes:
        model: a dense Llama.
        input_ids: ``[N, S]``.
        profile_tokens: P, tokens of the activation profiles of ``statistics``.
    """

    model: PreTrainedModel
    input_ids: Tensor
    profile_tokens: int = PROFILE_TOKENS

    @cached_property
    def statistics(self) -> NeuronStatistics:
        """Statistics of the neurons of every FFN."""
        return neuron_statistics(self.model, self.input_ids, profile_tokens=self.profile_tokens)

    @cached_property
    def metrics(self) -> list[Tensor]:
        """Fisher information of every FFN's output, per layer ``[D, D]``, see ``output_metrics``."""
        return output_metrics(self.model, self.input_ids)
