"""A GGUF file of a tiny Llama with a byte-level BPE tokenizer, as llama.cpp's converter lays it out."""

from __future__ import annotations

from pathlib import Path

import gguf
import numpy as np
from tokenizers import pre_tokenizers
from torch import Tensor
from transformers import LlamaForCausalLM

_NAMES = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate_proj": "ffn_gate",
    "mlp.up_proj": "ffn_up",
    "mlp.down_proj": "ffn_down",
}
# Byte-level tokens: BOS, EOS, unknown, the printable form of single bytes, and the result of one merge.
_BYTES = sorted(pre_tokenizers.ByteLevel.alphabet())[:60]
TOKENS = ["<s>", "</s>", "<unk>", *_BYTES, _BYTES[0] + _BYTES[1]]


def write_gguf(model: LlamaForCausalLM, path: Path) -> None:
    """Write the fp32 weights of a Llama with a vocabulary of 64 as a GGUF file."""
    config = model.config
    writer = gguf.GGUFWriter(str(path), "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    writer.add_tokenizer_model("gpt2")
    writer.add_token_list(TOKENS)
    writer.add_token_types([gguf.TokenType.CONTROL] * 3 + [gguf.TokenType.NORMAL] * (len(TOKENS) - 3))
    writer.add_token_merges([f"{_BYTES[0]} {_BYTES[1]}"])
    writer.add_bos_token_id(0)
    writer.add_eos_token_id(1)
    writer.add_unk_token_id(2)
    for name, value in _tensors(model).items():
        writer.add_tensor(name, value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _tensors(model: LlamaForCausalLM) -> dict[str, np.ndarray]:
    config, state = model.config, model.state_dict()
    found = {
        "token_embd.weight": state["model.embed_tokens.weight"],
        "output_norm.weight": state["model.norm.weight"],
        "output.weight": state["lm_head.weight"],
    }
    heads = {"self_attn.q_proj": config.num_attention_heads, "self_attn.k_proj": config.num_key_value_heads}
    for layer in range(config.num_hidden_layers):
        for name, stored in _NAMES.items():
            value = state[f"model.layers.{layer}.{name}.weight"]
            found[f"blk.{layer}.{stored}.weight"] = (
                _interleaved(value, heads[name]) if name in heads else value
            )
    return {name: value.float().numpy() for name, value in found.items()}


def _interleaved(weight: Tensor, heads: int) -> Tensor:
    """Rows of a query or key projection in GGUF's order, with the two rotary halves of each head interleaved."""
    return weight.reshape(heads, 2, -1, weight.shape[1]).transpose(1, 2).reshape(weight.shape)
