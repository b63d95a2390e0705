"""Description of one family of mixtures of experts: tensor names, module names, configuration keys, router."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from enum import StrEnum


class RouterKind(StrEnum):
    """Map from router logits to the gates of the experts that a token visits."""

    SOFTMAX_TOP_K = "softmax, then top-k"
    SOFTMAX_TOP_K_RENORMALIZED = "softmax, then top-k, renormalized"
    TOP_K_SOFTMAX = "top-k, then softmax"
    SIGMOID_BIASED = "sigmoid with selection bias"
    GRAPH_WALK = "graph walk"


@dataclass(frozen=True)
class RouterGroups:
    """Group-limited routing (DeepSeek-V3, arXiv:2412.19437): top-k within the groups of highest score.

    Attributes:
        count_key: configuration key of the number of groups.
        selected_key: configuration key of the number of groups that a token may use.
        count_names: attributes of the opened router that may hold the number of groups.
    """

    count_key: str = "n_group"
    selected_key: str = "topk_group"
    count_names: tuple[str, ...] = ("n_group", "num_group")


DENSE_FFN = r"(?:gate_proj|up_proj|down_proj)\..+"
NOTHING = r"(?!)"


@dataclass(frozen=True)
class MoEFamily:
    """Names of everything that holds experts in the models of one type, stored and opened.

    Stored names are regular expressions on the tensor name within the block: each matches exactly one tensor of a MoE
    layer. ``[E, ...]``: one row per expert.

    Attributes:
        blocks: names of the FFN of a decoder layer, stored and opened.
        routers: attributes of the block that may be the router module.
        kind: router kind; None where the configuration gives it (``scoring_func``, ``norm_topk_prob``).
        groups: group-limited routing; None for routers without groups.
        experts: attribute of the block that holds the experts; empty where it is the block itself.
        matrices: names of an expert's gate, up and down projection, where each expert has its own, stored (behind
            ``experts.NUMBER.``) and opened; one alternative each. Empty where experts are always fused.
        fused: stored weights of all experts, ``[E, ...]``: gate and up, then down.
        rows: every other stored tensor ``[E, ...]``: the router, then its selection bias.
        pairs: stored tensors ``[E, E]``, the edges of an expert graph.
        others: stored tensors of the block that belong to no expert.
        selection_bias: attribute of the router module: bias ``[E]`` of the choice, not of the gates.
        count_keys: names of E, as configuration keys and as module attributes.
        top_k_key: configuration key of the experts per token.
        top_k_names: attributes of the opened router, or else of the block, that may hold it.
        per_layer: whether the configuration holds E as a list, one entry a layer.
        shared_key: configuration key of the shared experts per layer that are the first of the E experts; empty where
            shared experts are modules of their own.
        default_key: configuration key of the experts per layer that default outputs of unvisited experts were fitted
            for; empty without such outputs.
        version_key: configuration key of the number of edits of the model's graph; empty without edges.
        merge_note: note on the result of merging such experts; empty for none.
        next_token_layers: whether layers behind the last may be stored that predict further tokens, which transformers
            does not read.
    """

    blocks: tuple[str, ...] = ("mlp",)
    routers: tuple[str, ...] = ("gate",)
    kind: RouterKind | None = None
    groups: RouterGroups | None = None
    experts: str = "experts"
    matrices: tuple[tuple[str, str, str], ...] = (("gate_proj", "up_proj", "down_proj"),)
    fused: tuple[str, ...] = (r"experts\.gate_up_proj", r"experts\.down_proj")
    rows: tuple[str, ...] = (r"gate\.weight",)
    pairs: tuple[str, ...] = ()
    others: str = DENSE_FFN
    selection_bias: str = "e_score_correction_bias"
    count_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    top_k_key: str = "num_experts_per_tok"
    top_k_names: tuple[str, ...] = ("top_k", "num_experts_per_tok")
    per_layer: bool = False
    shared_key: str = ""
    default_key: str = ""
    version_key: str = ""
    merge_note: str = ""
    next_token_layers: bool = False

    @property
    def own(self) -> tuple[str, ...]:
        """Stored gate, up and down of one expert, behind ``experts.NUMBER.``; empty where experts are fused."""
        return tuple(rf"(?:{'|'.join(names)})\.weight" for names in zip(*self.matrices, strict=True))

    def holds(self, counts: Sequence[int]) -> bool:
        """Whether the configuration can hold these numbers of experts, one per MoE layer."""
        return self.per_layer or len(set(counts)) <= 1

    def count_value(self, counts: Sequence[int]) -> int | list[int]:
        """Value of the keys of E for numbers of experts that the configuration ``holds``."""
        return list(counts) if self.per_layer else counts[0]
