"""Execution of removals on an opened model, one expert at a time: the steps of a compression trace."""

from __future__ import annotations

from collections.abc import Callable, Sequence

import torch
from transformers import PreTrainedModel

from configs.choices import Alignment, check_choice
from configs.errors import UserError
from experts.selection.compression_trace import Averaging, Removal, Step
from models.moe.layers import MoELayer
from models.moe.merge import merge_group
from models.moe.remove import remove_experts, set_counts
from models.moe.views import moe_layers


@torch.no_grad()
def execute_removal(
    layer: MoELayer, left: Sequence[int], removal: Removal, averaging: Averaging | None
) -> None:
    """Prune or merge one expert of a layer, in place; the view ``layer`` is stale afterwards.

    Args:
        layer: as the removals before have left it.
        left: original number of each expert of the layer, ascending.
        removal: in original numbers.
        averaging: weights and alignment of a merge; None for pruning.
    """
    expert, into = left.index(removal.expert), None
    if removal.into is not None:
        assert averaging is not None
        into = left.index(removal.into)
        shares = (averaging.weight_into, averaging.weight_expert)
        merge_group(layer, [into, expert], shares, averaging.alignment)
    remove_experts(layer, {expert: into})


@torch.no_grad()
def replay_trace(
    model: PreTrainedModel,
    steps: Sequence[Step],
    *,
    on_step: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[dict[int, list[int]]]:
    """Execute the steps of a compression trace on a model in place, exactly as the planner measured them.

    Args:
        model: the model that the trace was measured on.
        steps: of ``read_trace`` or of a ``CompressionTrace``.
        on_step: called with the stage, the steps done and their number.

    Returns:
        Per MoE layer the groups: by the original number of each expert that stays, the original numbers of the experts
        merged into it, itself first.

    Raises:
        UserError: a layer or expert that the model does not have, or a layer without experts.
    """
    model.eval()
    layers = moe_layers(model)
    groups = [{expert: [expert] for expert in range(layer.num_experts)} for layer in layers]
    check_steps(steps, [(layer.decoder, layer.num_experts, layer.num_shared) for layer in layers])
    for number, step in enumerate(steps, start=1):
        removal, group = step.removal, groups[step.removal.layer]
        execute_removal(moe_layers(model)[removal.layer], list(group), removal, step.averaging)
        members = group.pop(removal.expert)
        if removal.into is not None:
            group[removal.into] += members
        on_step("executing steps", number, len(steps))
    set_counts(model)
    return groups


def check_steps(steps: Sequence[Step], layers: Sequence[tuple[int, int, int]]) -> None:
    """Refuse steps that do not fit a model.

    Args:
        steps: of a compression trace.
        layers: decoder index, number of experts and number of shared experts of each MoE layer.

    Raises:
        UserError: a layer or expert that the model does not have, a shared expert, a layer without experts, an unknown
            alignment.
    """
    left = [number for _, number, _ in layers]
    for number, step in enumerate(steps, start=1):
        layer, experts = step.removal.layer, (step.removal.expert, step.removal.into or 0)
        if layer >= len(layers) or layers[layer][0] != step.decoder_layer or max(experts) >= layers[layer][1]:
            raise UserError(
                f"step {number}: expected a layer and experts of this model, got {step.removal} in decoder layer "
                f"{step.decoder_layer}; the plan is of another model"
            )
        if min(step.removal.expert, step.removal.into or step.removal.expert) < layers[layer][2]:
            raise UserError(
                f"step {number}: expected experts that the router chooses, got {step.removal}; the first "
                f"{layers[layer][2]} experts of the layer are shared, and every token visits them"
            )
        if step.averaging is not None:
            check_choice("`alignment`", step.averaging.alignment, Alignment)
        left[layer] -= 1
        if not left[layer]:
            raise UserError(f"step {number}: expected an expert to stay in MoE layer {layer}, got none")
