"""Tiny random mixtures of experts of Hugging Face's families, in memory and on the disk."""

from __future__ import annotations

from pathlib import Path

import torch
import transformers
from transformers import PreTrainedModel, PreTrainedTokenizerBase

SHAPE = {
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 24,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 128,
    "initializer_range": 0.2,
    "bos_token_id": 0,
    "eos_token_id": 1,
    "pad_token_id": None,
    "num_experts_per_tok": 2,
}
# One dense layer first, so that a MoE layer's ordinal differs from its decoder index; two MoE layers behind it.
DENSE_FIRST = {"num_hidden_layers": 3, "first_k_dense_replace": 1, "n_routed_experts": 6, "n_group": 1}
DENSE_FIRST |= {"topk_group": 1, "moe_intermediate_size": 16, "n_shared_experts": 1, "norm_topk_prob": True}
LATENT = {
    "q_lora_rank": 16,
    "kv_lora_rank": 16,
    "qk_nope_head_dim": 8,
    "qk_rope_head_dim": 8,
    "v_head_dim": 8,
}
# By model type: prefix of its classes, and what its configuration has beside SHAPE.
FAMILIES = {
    "mixtral": ("Mixtral", {"num_local_experts": 4}),
    "qwen2_moe": (
        "Qwen2Moe",
        {"num_experts": 6, "moe_intermediate_size": 16, "shared_expert_intermediate_size": 16},
    ),
    "qwen3_moe": (
        "Qwen3Moe",
        {"num_experts": 8, "moe_intermediate_size": 16, "head_dim": 8, "norm_topk_prob": True},
    ),
    "olmoe": ("Olmoe", {"num_experts": 5}),
    "granitemoe": ("GraniteMoe", {"num_local_experts": 4}),
    "granitemoeshared": ("GraniteMoeShared", {"num_local_experts": 4, "shared_intermediate_size": 16}),
    "deepseek_v3": ("DeepseekV3", {**DENSE_FIRST, **LATENT, "num_key_value_heads": 4}),
    "glm4_moe": ("Glm4Moe", {**DENSE_FIRST, "head_dim": 8}),
}


def tiny_moe(family: str, **overrides) -> PreTrainedModel:
    """A random MoE of two MoE layers, width 32, vocabulary 64, 4 to 8 experts, 2 a token.

    Args:
        family: one of ``FAMILIES``.
        overrides: of its configuration.
    """
    prefix, own = FAMILIES[family]
    config = getattr(transformers, f"{prefix}Config")(**{**SHAPE, **own, **overrides})
    torch.manual_seed(0)
    model = getattr(transformers, f"{prefix}ForCausalLM")(config).eval()
    for name, values in (*model.named_parameters(), *model.named_buffers()):
        if name.endswith("e_score_correction_bias"):
            values.data.normal_(std=0.1)
    return model


def saved_moe(family: str, tmp_path: Path, tokenizer: PreTrainedTokenizerBase, **overrides) -> Path:
    """The directory of a saved ``tiny_moe`` with its tokenizer."""
    directory = tmp_path / family
    tiny_moe(family, **overrides).save_pretrained(directory)
    tokenizer.save_pretrained(directory)
    return directory
