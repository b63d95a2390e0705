"""Table of the supported families of mixtures of experts, by model type: the one place that names them."""

from __future__ import annotations

from typing import Any

from configs.errors import UserError
from models.families.family import DENSE_FFN, NOTHING, MoEFamily, RouterGroups, RouterKind
from models.remote_code.configuration_fedgraft import FedGraftConfig

_GRANITE = MoEFamily(
    blocks=("block_sparse_moe",),
    routers=("router",),
    kind=RouterKind.TOP_K_SOFTMAX,
    matrices=(),
    fused=(r"input_linear\.weight|experts\.gate_up_proj", r"output_linear\.weight|experts\.down_proj"),
    rows=(r"router\.(?:layer\.)?weight",),
    others=NOTHING,
    count_keys=("num_local_experts", "num_experts"),
)
_SIGMOID = MoEFamily(
    kind=RouterKind.SIGMOID_BIASED,
    groups=RouterGroups(),
    rows=(r"gate\.weight", r"gate\.e_score_correction_bias"),
    others=rf"(?:shared_experts\.)?{DENSE_FFN}",
    count_keys=("n_routed_experts", "num_experts", "num_local_experts"),
    next_token_layers=True,
)

FAMILIES: dict[str, MoEFamily] = {
    FedGraftConfig.model_type: MoEFamily(
        routers=("router",),
        kind=RouterKind.GRAPH_WALK,
        experts="",
        matrices=(),
        fused=("gate_up_proj", "down_proj"),
        rows=("router", "output_gain", "neurons"),
        pairs=("edge_gain", "edge_affinity", "edges"),
        others=r"default\.(?:down|up|bias)",
        count_keys=("num_experts",),
        top_k_key="experts_per_token",
        per_layer=True,
        shared_key="num_shared",
        default_key="default_experts",
        version_key="graph_version",
        merge_note="the experts of a graph are disjoint parts of one dense FFN and share nothing by construction: "
        "compare what merging costs with pruning the same experts",
    ),
    "mixtral": MoEFamily(
        blocks=("block_sparse_moe", "mlp"),
        kind=RouterKind.SOFTMAX_TOP_K_RENORMALIZED,
        matrices=(("w1", "w3", "w2"),),
        others=NOTHING,
        count_keys=("num_local_experts", "num_experts"),
    ),
    "qwen2_moe": MoEFamily(others=rf"(?:shared_expert\.)?{DENSE_FFN}|shared_expert_gate\.weight"),
    "qwen3_moe": MoEFamily(),
    "olmoe": MoEFamily(),
    "granitemoe": _GRANITE,
    "granitemoeshared": _GRANITE,
    "deepseek_v3": _SIGMOID,
    "glm4_moe": _SIGMOID,
}

# Opened models of other types: their modules are looked for by all names that are common.
_UNLISTED = MoEFamily(
    blocks=("mlp", "block_sparse_moe", "feed_forward"),
    routers=("gate", "router"),
    groups=RouterGroups(),
    matrices=(("gate_proj", "up_proj", "down_proj"), ("w1", "w3", "w2")),
    count_keys=("num_experts", "n_routed_experts", "num_local_experts"),
)


def family_of(config: Any) -> MoEFamily:
    """Family of an opened model by its configuration; common names for a type that is not in the table."""
    return FAMILIES.get(config.model_type, _UNLISTED)


def router_kind(config: Any) -> RouterKind:
    """Router kind of the model with this configuration.

    Raises:
        UserError: neither the table nor the configuration gives it.
    """
    if kind := family_of(config).kind:
        return kind
    if getattr(config, "scoring_func", None) == "sigmoid":
        return RouterKind.SIGMOID_BIASED
    renormalized = getattr(config, "norm_topk_prob", None)
    if isinstance(renormalized, bool):
        return RouterKind.SOFTMAX_TOP_K_RENORMALIZED if renormalized else RouterKind.SOFTMAX_TOP_K
    raise UserError(
        f"expected a model type whose router is known, got {config.model_type!r}; its configuration names neither "
        "scoring_func nor norm_topk_prob"
    )
