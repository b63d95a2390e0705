"""Writing of GGUF files: Llama, and Mixtral under the same architecture, and Qwen2-MoE."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import gguf
from transformers import (
    LlamaConfig,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
    Qwen2MoeConfig,
)

from configs.choices import ExportedWeights
from configs.errors import UserError
from models.export.gguf_files.storage import encode, stored_type
from models.export.gguf_files.tensors import gguf_tensors, head_width
from models.export.gguf_files.vocabulary import write_vocabulary

_ARCHITECTURES = {LlamaConfig: "llama", MixtralConfig: "llama", Qwen2MoeConfig: "qwen2moe"}
_FILE_TYPES = {
    ExportedWeights.FP32: gguf.LlamaFileType.ALL_F32,
    ExportedWeights.BF16: gguf.LlamaFileType.MOSTLY_BF16,
    ExportedWeights.FP16: gguf.LlamaFileType.MOSTLY_F16,
    ExportedWeights.Q8_0: gguf.LlamaFileType.MOSTLY_Q8_0,
}


def architecture_of(config: Any) -> str:
    """Architecture in llama.cpp of a configuration of transformers.

    Raises:
        UserError: there is none that computes the same.
    """
    name = _ARCHITECTURES.get(type(config))
    if name is None:
        raise UserError(
            f"expected a Llama, a Mixtral or a Qwen2-MoE for a GGUF file, got a model of type {config.model_type!r}"
        )
    rope = config.rope_parameters.get("rope_type", "default")
    known = ("default", "llama3") if name == "llama" else ("default",)
    if rope not in known:
        raise UserError(
            f"expected rotary embeddings of type {' or '.join(known)} for the architecture {name}, got {rope!r}"
        )
    if config.hidden_act != "silu" or getattr(config, "mlp_bias", False):
        raise UserError(f"expected gated FFNs with silu and without biases, got {config.hidden_act!r}")
    if name == "qwen2moe" and head_width(config) * config.num_attention_heads != config.hidden_size:
        raise UserError(
            "expected heads whose widths add up to the hidden width for the architecture qwen2moe, got "
            f"{config.num_attention_heads} of {head_width(config)} for {config.hidden_size}; "
            "set `gguf_model` to mixtral"
        )
    return name


def write_gguf(
    model: PreTrainedModel, tokenizer: PreTrainedTokenizerBase, path: Path, weights: ExportedWeights
) -> None:
    """Write an opened model and its tokenizer as one GGUF file.

    Args:
        model: Llama, Mixtral or Qwen2-MoE.
        tokenizer: byte-level BPE tokenizer.
        path: new file.
        weights: type of the weights; vectors and routers are in fp32.

    Raises:
        UserError: as ``architecture_of`` and ``write_vocabulary``.
    """
    config = model.config
    architecture = architecture_of(config)
    writer = gguf.GGUFWriter(str(path), architecture)
    writer.add_file_type(_FILE_TYPES[weights])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    _add_shape(writer, config)
    if architecture == "qwen2moe" or isinstance(config, MixtralConfig):
        _add_experts(writer, config)
    write_vocabulary(writer, tokenizer, config.vocab_size)
    # The architecture llama takes the embedding where there is no output head; the other one requires a head.
    tied = architecture == "llama" and config.tie_word_embeddings
    for name, parameter, values in gguf_tensors(model, interleaved=architecture == "llama"):
        if tied and name == "output.weight":
            continue
        kind = stored_type(parameter, values.shape, weights)
        writer.add_tensor(name, encode(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def _add_shape(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_name(str(getattr(config, "_name_or_path", "") or config.model_type))
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(head_width(config))
    writer.add_value_length(head_width(config))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_rope_dimension_count(head_width(config))
    writer.add_vocab_size(config.vocab_size)


def _add_experts(writer: gguf.GGUFWriter, config: Any) -> None:
    writer.add_expert_count(getattr(config, "num_local_experts", None) or config.num_experts)
    writer.add_expert_used_count(config.num_experts_per_tok)
    if isinstance(config, Qwen2MoeConfig):
        writer.add_expert_feed_forward_length(config.moe_intermediate_size)
        writer.add_expert_shared_feed_forward_length(config.shared_expert_intermediate_size)
