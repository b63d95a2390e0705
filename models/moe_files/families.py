"""How families of mixtures of experts name their tensors and their settings in a checkpoint."""

from __future__ import annotations

from dataclasses import dataclass

from models.remote_code.configuration_fedgraft import FedGraftConfig

OURS = FedGraftConfig.model_type
_DENSE = r"(?:gate_proj|up_proj|down_proj)\..+"
_NOTHING = r"(?!)"


@dataclass(frozen=True)
class MoEFamily:
    """How the models of one type name their experts in a checkpoint.

    Names of tensors are those within the block, as patterns: each matches exactly one tensor of a MoE layer.

    Attributes:
        blocks: names that the FFN of a decoder layer may bear.
        own: gate, up and down of one expert, behind ``experts.NUMBER.``; empty where all experts are fused.
        fused: the weights of all experts, ``[E, ...]``: gate and up, then down.
        rows: everything else with one row an expert, ``[E, ...]``: the router, then its selection bias.
        pairs: tensors ``[E, E]``.
        others: what else may stand in the block and belongs to no expert.
        count_keys: keys of the configuration that may hold E.
        top_k_key: key of the experts per token.
        per_layer: whether the configuration holds E as a list, one a layer.
        grouped: whether the router first chooses among groups of experts, by the two best of each.
        next_token_layers: whether layers behind the last may be stored that predict further tokens, which
            transformers does not read.
    """

    blocks: tuple[str, ...] = ("mlp",)
    own: tuple[str, ...] = (r"gate_proj\.weight", r"up_proj\.weight", r"down_proj\.weight")
    fused: tuple[str, ...] = (r"experts\.gate_up_proj", r"experts\.down_proj")
    rows: tuple[str, ...] = (r"gate\.weight",)
    pairs: tuple[str, ...] = ()
    others: str = _DENSE
    count_keys: tuple[str, ...] = ("num_experts", "num_local_experts")
    top_k_key: str = "num_experts_per_tok"
    per_layer: bool = False
    grouped: bool = False
    next_token_layers: bool = False


_BIASED = MoEFamily(
    rows=(r"gate\.weight", r"gate\.e_score_correction_bias"),
    others=rf"(?:shared_experts\.)?{_DENSE}",
    count_keys=("n_routed_experts", "num_experts", "num_local_experts"),
    grouped=True,
    next_token_layers=True,
)

FAMILIES: dict[str, MoEFamily] = {
    OURS: MoEFamily(
        own=(),
        fused=("gate_up_proj", "down_proj"),
        rows=("router", "output_gain", "neurons"),
        pairs=("edge_gain", "edge_affinity", "edges"),
        others=_NOTHING,
        count_keys=("num_experts",),
        top_k_key="experts_per_token",
        per_layer=True,
    ),
    "mixtral": MoEFamily(
        blocks=("block_sparse_moe", "mlp"),
        own=(r"w1\.weight", r"w3\.weight", r"w2\.weight"),
        others=_NOTHING,
        count_keys=("num_local_experts", "num_experts"),
    ),
    "qwen2_moe": MoEFamily(others=rf"(?:shared_expert\.)?{_DENSE}|shared_expert_gate\.weight"),
    "qwen3_moe": MoEFamily(),
    "olmoe": MoEFamily(),
    "granitemoeshared": MoEFamily(
        blocks=("block_sparse_moe",),
        own=(),
        fused=(r"input_linear\.weight|experts\.gate_up_proj", r"output_linear\.weight|experts\.down_proj"),
        rows=(r"router\.(?:layer\.)?weight",),
        others=_NOTHING,
        count_keys=("num_local_experts", "num_experts"),
    ),
    "deepseek_v3": _BIASED,
    "glm4_moe": _BIASED,
}
