"""Merging of experts of an opened model, layer by layer, on the outputs of the merged layers before.

REAM: Jha et al. 2026, "REAM: Merging Improves Pruning of Experts in LLMs", arXiv:2604.04356. Beyond it, merged experts
are refitted to the previous output of their layer (see ``models.moe.refit``).
Shape suffixes: T tokens, D hidden width, E experts, F = T D.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from transformers import PreTrainedModel

from configs.choices import Alignment, Average, Similarity, check_choice
from configs.errors import UserError
from experts.merging.alignment import align_neurons, average_experts, group_experts
from experts.selection.expert_list import check_keep_map
from models.moe.hooks import observing_experts
from models.moe.layers import ExpertRows, MoELayer
from models.moe.layerwise import LayerInputs, walk_layers
from models.moe.refit import block_output, refit_experts
from models.moe.remove import remove_experts, set_counts
from models.moe.routers import all_gates, router_logits
from models.moe.saliency_collection import SaliencySums, attention_mask_kwargs
from models.moe.views import moe_layers

Batch = tuple[Tensor, Tensor]

# Tokens per chunk: the outputs of all experts on a chunk are in memory.
_TOKENS_AT_ONCE = 128


@dataclass(frozen=True)
class MergeOptions:
    """Similarity, alignment, averaging and refit of merged experts.

    Attributes:
        similarity: ``gated``: cosine of two experts' outputs on all tokens, each weighted by its gate (REAM);
            ``average``: cosine of their mean outputs (HC-SMoE, Chen et al. 2024, arXiv:2410.08589).
        alignment: alignment of neurons before averaging (see ``experts.merging.alignment.align_neurons``).
        max_group_size: largest number of experts merged into one.
        weights: averaging weights. ``centroid``: the expert that stays alone, as the start of the refit;
            ``saliency``: gate times output norm, summed over the tokens routed to an expert; ``mean-saliency``: its
            mean over these tokens, as in REAM; ``plain``: equal weights.
        refit: whether down projections of merged experts are fitted to the layer's previous output.
        sample_tokens: number of tokens of the similarity.
        refit_tokens: number of tokens of the refit.
    """

    similarity: str = "gated"
    alignment: str = "centroid"
    max_group_size: int = 4
    weights: str = "centroid"
    refit: bool = True
    sample_tokens: int = 1024
    refit_tokens: int = 16384

    def __post_init__(self) -> None:
        check_choice("`alignment`", self.alignment, Alignment)
        check_choice("`similarity`", self.similarity, Similarity)
        check_choice("`weights`", self.weights, Average)
        if self.weights == "centroid" and not self.refit:
            raise UserError(
                "expected a refit or weights other than centroid, got neither; that is pruning: enable the refit or "
                "choose other weights"
            )
        if self.max_group_size < 1:
            raise UserError(f"expected a largest group size of at least 1, got {self.max_group_size}")


@torch.no_grad()
def merge_experts(
    model: PreTrainedModel,
    batches: Sequence[Batch],
    keep_map: Mapping[int, np.ndarray],
    options: MergeOptions,
    *,
    on_step: Callable[[str, int, int], None] = lambda stage, done, total: None,
) -> list[dict[int, list[int]]]:
    """Merge every expert that is not in ``keep_map`` into a routed one that is, in place; shared experts do not change.

    The router keeps the rows of the kept experts. Saliency and similarity of a layer are measured on the outputs of the
    layers before it, which are merged by then.

    Args:
        model: any with experts (see ``models.moe.views``).
        batches: calibration text, ``(input_ids [B, S], token_mask [B, S] bool)``.
        keep_map: MoE-layer ordinal to the kept experts; an unnamed layer keeps all.
        options: grouping, averaging and refit.
        on_step: called with the stage, the layers done and their number.

    Returns:
        Groups per MoE layer: by the old number of each kept expert, the old numbers of its group, itself first.

    Raises:
        UserError: a keep map that does not fit or removes a shared expert, groups that cannot hold all experts, no
            calibration text.
    """
    model.eval()
    layers = {layer.decoder: layer for layer in moe_layers(model)}
    counts = [(layer.num_experts, layer.num_shared) for layer in layers.values()]
    check_keep_map(keep_map, [number for number, _ in counts], [shared for _, shared in counts])
    if not any(bool(token_mask.any()) for _, token_mask in batches):
        raise UserError("expected calibration text to merge on, got no token; check the data")
    groups: list[dict[int, list[int]]] = []
    placed = [(ids.to(model.device), token_mask) for ids, token_mask in batches]
    for inputs in walk_layers(
        model, [(ids, attention_mask_kwargs(ids, token_mask)) for ids, token_mask in placed]
    ):
        layer = layers.get(inputs.index)
        if layer is None:
            continue
        kept = np.sort(keep_map.get(layer.ordinal, np.arange(layer.num_experts)))
        groups.append(_merge_layer(model, layer, inputs, [mask for _, mask in batches], kept, options))
        on_step("merging layers", len(groups), len(layers))
    set_counts(model)
    return groups


def output_similarity(layer: MoELayer, x_TD: Tensor, mode: str) -> np.ndarray:
    """Cosine similarity ``[E, E]`` of experts' outputs on the tokens ``x``, every expert run on every token.

    Args:
        layer: layer of the experts; edges of a graph are ignored.
        x_TD: inputs of the layer.
        mode: see ``configs.choices.Similarity``.
    """
    gram_EE = torch.zeros(layer.num_experts, layer.num_experts, dtype=torch.float64)
    sum_ED = torch.zeros(layer.num_experts, x_TD.shape[-1], dtype=torch.float64)
    for chunk_TD in x_TD.split(_TOKENS_AT_ONCE):
        weights_ET = torch.ones(layer.num_experts, 1)
        if mode == "gated":
            weights_ET = all_gates(layer, router_logits(layer, chunk_TD)).T
        outputs_ETD = torch.stack(
            [layer.run(expert, chunk_TD) for expert in range(layer.num_experts)]
        ).float()
        flat_EF = (outputs_ETD * weights_ET[..., None].to(outputs_ETD)).flatten(1)
        gram_EE += (flat_EF @ flat_EF.T).double().cpu()
        sum_ED += outputs_ETD.sum(1).double().cpu()
    if mode == "average":
        gram_EE = sum_ED @ sum_ED.T
    norm_E = gram_EE.diagonal().clamp(min=1e-30).sqrt()
    return (gram_EE / norm_E / norm_E[:, None]).numpy()


def _merge_layer(
    model: PreTrainedModel,
    layer: MoELayer,
    inputs: LayerInputs,
    masks: Sequence[Tensor],
    kept: np.ndarray,
    options: MergeOptions,
) -> dict[int, list[int]]:
    if len(kept) == layer.num_experts:
        return {int(expert): [int(expert)] for expert in kept}
    x_TD, weights_E = _observe(layer, inputs, masks, options)
    alike_EE = output_similarity(layer, x_TD[: options.sample_tokens], options.similarity)
    groups = _groups(alike_EE, kept, layer.num_shared, options.max_group_size)
    wanted_TD = block_output(layer, x_TD) if options.refit else None
    for group in groups.values():
        if len(group) > 1 and options.weights != "centroid":
            merge_group(layer, group, weights_E[group].tolist(), options.alignment)
    remove_experts(layer, {gone: centroid for centroid, group in groups.items() for gone in group[1:]})
    if wanted_TD is not None:
        merged = [index for index, group in enumerate(groups.values()) if len(group) > 1]
        refit_experts(moe_layers(model)[layer.ordinal], merged, x_TD, wanted_TD)
    return groups


def _groups(alike_EE: np.ndarray, kept: np.ndarray, shared: int, max_group_size: int) -> dict[int, list[int]]:
    """Groups of ``group_experts`` among the routed experts, behind one group for each of the first ``shared``."""
    routed = group_experts(alike_EE[shared:, shared:], kept[shared:] - shared, max_group_size)
    groups = {expert: [expert] for expert in range(shared)}
    return groups | {shared + first: [shared + each for each in group] for first, group in routed.items()}


@torch.no_grad()
def merge_group(layer: MoELayer, group: Sequence[int], shares: Sequence[float], alignment: str) -> None:
    """Overwrite the first expert of a group with the group's weighted average; the others stay unchanged.

    Args:
        layer: layer of the experts.
        group: expert numbers; neurons of the others are aligned to those of the first.
        shares: averaging weight of each, not normalized.
        alignment: see ``configs.choices.Alignment``.
    """
    first, *others = (layer.read_numpy(expert) for expert in group)
    aligned = [first, *(align_neurons(*other, *first, alignment) for other in others)]
    gate_up, down = (torch.from_numpy(part) for part in average_experts(aligned, shares))
    layer.write(group[0], gate_up, down)


def _observe(
    layer: MoELayer, inputs: LayerInputs, masks: Sequence[Tensor], options: MergeOptions
) -> tuple[Tensor, np.ndarray]:
    """Layer inputs of the first masked tokens, ``[T, D]``, and the experts' averaging weights, ``[E]``."""
    sums, tokens = SaliencySums([layer]), max(
        options.sample_tokens, options.refit_tokens if options.refit else 0
    )
    parts: list[Tensor] = []

    def on_batch(batch: int) -> None:
        sums.finish()
        sums.start(masks[batch])

    def on_rows(_: MoELayer, rows: ExpertRows) -> None:
        sums.add(0, rows)

    def on_input(_: torch.nn.Module, arguments: tuple[Tensor, ...]) -> None:
        wanted = tokens - sum(len(part) for part in parts)
        if wanted > 0:
            parts.append(arguments[0].flatten(0, -2)[sums.token_mask.to(arguments[0].device)][:wanted])

    hook = layer.block.register_forward_pre_hook(on_input)
    try:
        with observing_experts([layer], on_rows):
            inputs.run(on_batch)
    finally:
        hook.remove()
    sums.finish()
    saliency_E, counts_E = sums.values[0][0].numpy(), sums.counts[0].numpy()
    weights = {"saliency": saliency_E, "mean-saliency": saliency_E / np.maximum(counts_E, 1)}
    return torch.cat(parts), weights.get(options.weights, np.ones_like(saliency_E))
