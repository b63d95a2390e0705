"""One view on the experts of an opened model: our graph, Hugging Face's fused mixtures, and lists of expert modules.

Layers are counted among those that have experts, from 0; the decoder's own number stands beside it.
Shape suffixes: D hidden width, E experts, H neurons per expert.
"""

from __future__ import annotations

from dataclasses import dataclass
from enum import StrEnum
from typing import Any, cast

import numpy as np
import torch
from torch import Tensor, nn
from transformers import PreTrainedModel
from transformers.integrations.moe import _default_apply_gate

from configs.errors import UserError
from models.remote_code.execution_fedgraft import gated_ffn
from models.remote_code.experts_fedgraft import ExpertGraphMLP


class RouterKind(StrEnum):
    """How router scores become the gates of the experts that a token visits."""

    SOFTMAX_TOP_K = "softmax, then top-k"
    SOFTMAX_TOP_K_RENORMALIZED = "softmax, then top-k, renormalized"
    TOP_K_SOFTMAX = "top-k, then softmax"
    SIGMOID_BIASED = "sigmoid with selection bias"
    GRAPH_WALK = "graph walk"


@dataclass(frozen=True)
class MoELayer:
    """The experts of one decoder layer.

    Attributes:
        ordinal: among the layers with experts, from 0.
        decoder: index of the decoder layer.
        kind: of the router.
        block: what stands in place of the dense FFN.
        router: holds ``weight [E, D]``; None where the block holds the router itself (our graph).
        experts: fused tensors, a list of modules, or the block itself (our graph).
    """

    ordinal: int
    decoder: int
    kind: RouterKind
    block: nn.Module
    router: nn.Module | None
    experts: Any

    @property
    def router_weight(self) -> nn.Parameter:
        """``[E, D]``."""
        return cast(nn.Parameter, self.block.router if self.router is None else self.router.weight)

    @property
    def selection_bias(self) -> Tensor | None:
        """``[E]``, added to the scores that choose experts and not to the gates; None without one."""
        return getattr(self.router, "e_score_correction_bias", None)

    @property
    def num_experts(self) -> int:
        """E."""
        return self.router_weight.shape[0]

    @property
    def top_k(self) -> int:
        """Experts that a token visits; fewer where the layer has fewer."""
        if isinstance(self.block, ExpertGraphMLP):
            return min(self.block.num_visits, self.num_experts)
        owner = self.router if hasattr(self.router, "top_k") else self.block
        for name in ("top_k", "num_experts_per_tok"):
            if isinstance(getattr(owner, name, None), int):
                return min(getattr(owner, name), self.num_experts)
        raise UserError(f"expected top_k on the router of decoder layer {self.decoder}, got none")

    @property
    def fused(self) -> bool:
        """Whether one tensor holds all experts, as transformers 5 stores them."""
        return not isinstance(self.experts, nn.ModuleList | ExpertGraphMLP)

    @property
    def act_fn(self) -> nn.Module:
        """Activation of the gate."""
        owner = self.experts[0] if isinstance(self.experts, nn.ModuleList) else self.experts
        return cast(nn.Module, owner.act_fn)

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """``gate_up [2H, D]`` and ``down [D, H]`` of an expert."""
        if isinstance(self.experts, ExpertGraphMLP):
            return self.experts.read_expert(expert)
        if isinstance(self.experts, nn.ModuleList):
            gate, up, down = cast(tuple, _matrices(self.experts[expert]))
            return torch.cat([gate.weight, up.weight]), down.weight
        return self.experts.gate_up_proj[expert], self.experts.down_proj[expert]

    @torch.no_grad()
    def read_numpy(self, expert: int) -> tuple[np.ndarray, np.ndarray]:
        """``gate_up [2H, D]`` and ``down [D, H]`` of an expert, fp32."""
        gate_up, down = self.read(expert)
        return gate_up.float().cpu().numpy(), down.float().cpu().numpy()

    @torch.no_grad()
    def write(self, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Replace the weights of an expert; both are cast to what is there."""
        if isinstance(self.experts, ExpertGraphMLP):
            self.experts.write_expert(expert, gate_up, down)
        elif isinstance(self.experts, nn.ModuleList):
            gate_part, up_part = gate_up.chunk(2)
            for linear, value in zip(
                _matrices(self.experts[expert]), (gate_part, up_part, down), strict=True
            ):
                linear.weight.copy_(value)
        else:
            self.experts.gate_up_proj[expert] = gate_up.to(self.experts.gate_up_proj)
            self.experts.down_proj[expert] = down.to(self.experts.down_proj)

    def run(self, expert: int, rows_ND: Tensor) -> Tensor:
        """Output ``[N, D]`` of an expert, its gate not applied and nothing passed along edges."""
        return gated_ffn(self.act_fn, rows_ND, *self.read(expert))


def moe_layers(model: PreTrainedModel) -> list[MoELayer]:
    """The layers of a model that have experts, in order.

    Raises:
        UserError: none has, or a layer stores experts in a way that is not known.
    """
    decoders = getattr(getattr(model, "model", None), "layers", None)
    if decoders is None:
        raise UserError(f"expected a decoder with model.layers, got {type(model).__name__}")
    found: list[MoELayer] = []
    for index, decoder in enumerate(decoders):
        block = _block(decoder)
        if block is not None:
            found.append(_layer(model.config, len(found), index, block))
    if not found:
        raise UserError(f"expected a model with experts, got {type(model).__name__}, whose layers have none")
    return found


def router_kind(config: Any) -> RouterKind:
    """How the router of a model with this configuration makes gates of scores.

    Raises:
        UserError: the configuration does not say.
    """
    if config.model_type in _KINDS:
        return _KINDS[config.model_type]
    if getattr(config, "scoring_func", None) == "sigmoid":
        return RouterKind.SIGMOID_BIASED
    renormalized = getattr(config, "norm_topk_prob", None)
    if isinstance(renormalized, bool):
        return RouterKind.SOFTMAX_TOP_K_RENORMALIZED if renormalized else RouterKind.SOFTMAX_TOP_K
    raise UserError(
        f"expected a model type whose router is known, got {config.model_type!r}; its configuration names neither "
        "scoring_func nor norm_topk_prob"
    )


# Of model types whose configuration leaves the router's kind to the code.
_KINDS = {
    "fedgraft": RouterKind.GRAPH_WALK,
    "mixtral": RouterKind.SOFTMAX_TOP_K_RENORMALIZED,
    "granitemoe": RouterKind.TOP_K_SOFTMAX,
    "granitemoeshared": RouterKind.TOP_K_SOFTMAX,
    "deepseek_v3": RouterKind.SIGMOID_BIASED,
    "glm4_moe": RouterKind.SIGMOID_BIASED,
}
_BLOCKS = ("mlp", "block_sparse_moe", "feed_forward")
_FUSED = ("gate_up_proj", "down_proj")
# Gate, up and down of an expert that is a module.
_MATRICES = (("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2"))


def _block(decoder: nn.Module) -> nn.Module | None:
    """What holds the experts of a decoder layer; None in a dense one."""
    for name in _BLOCKS:
        block = getattr(decoder, name, None)
        if isinstance(block, ExpertGraphMLP) or hasattr(block, "experts"):
            return block
    return None


def _layer(config: Any, ordinal: int, index: int, block: nn.Module) -> MoELayer:
    kind = router_kind(config)
    if isinstance(block, ExpertGraphMLP):
        return MoELayer(ordinal, index, kind, block, None, block)
    router = next((getattr(block, name) for name in ("gate", "router") if hasattr(block, name)), None)
    if not isinstance(getattr(router, "weight", None), Tensor) or not _is_known(block.experts):
        raise UserError(
            f"expected a router with a weight, and experts as gate_up_proj [E, 2H, D] with down_proj [E, D, H] or as a "
            f"list of modules with gate, up and down projections; decoder layer {index} has {type(block).__name__}, "
            "whose layout is not supported"
        )
    return MoELayer(ordinal, index, kind, block, router, block.experts)


def _is_known(experts: Any) -> bool:
    if isinstance(experts, nn.ModuleList):
        return all(_matrices(expert) is not None and hasattr(expert, "act_fn") for expert in experts)
    shapes = [tuple(getattr(getattr(experts, name, None), "shape", ())) for name in _FUSED]
    if [len(shape) for shape in shapes] != [3, 3] or getattr(experts, "has_bias", False):
        return False
    (_, twice, width), down = shapes
    # Interleaved gate and up rows, or transposed matrices, have other meanings in the same names.
    plain = getattr(experts, "is_concatenated", True) and not getattr(experts, "is_transposed", False)
    # Some families clamp or scale between gate and up.
    gated = getattr(type(experts), "_apply_gate", _default_apply_gate) is _default_apply_gate
    return plain and gated and tuple(down[1:]) == (width, twice // 2) and hasattr(experts, "act_fn")


def _matrices(expert: nn.Module) -> tuple[nn.Linear, nn.Linear, nn.Linear] | None:
    for names in _MATRICES:
        linears = [getattr(expert, name, None) for name in names]
        if all(isinstance(linear, nn.Linear) and linear.bias is None for linear in linears):
            return tuple(linears)  # type: ignore[return-value]
    return None
