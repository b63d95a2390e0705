"""Models of transformers that take over everything but the FFNs of an expert graph."""

from __future__ import annotations

import copy
from typing import Any

import torch
from transformers import PreTrainedModel
from transformers.initialization import no_init_weights

from configs.errors import UserError
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

# Configuration keys of attention, norms, embeddings and special tokens, which Llama and its mixtures share.
_SHARED_KEYS = (
    "vocab_size",
    "hidden_size",
    "num_hidden_layers",
    "num_attention_heads",
    "num_key_value_heads",
    "hidden_act",
    "max_position_embeddings",
    "initializer_range",
    "rms_norm_eps",
    "pad_token_id",
    "bos_token_id",
    "eos_token_id",
    "tie_word_embeddings",
    "rope_parameters",
    "attention_dropout",
)


def shared_settings(graph: FedGraftForCausalLM) -> dict[str, Any]:
    """Configuration values of a graph that other decoders name alike: attention, norms, embeddings, tokens."""
    values = graph.config.to_dict()
    return {key: copy.deepcopy(values[key]) for key in _SHARED_KEYS}


@torch.no_grad()
def plain_model(graph: FedGraftForCausalLM, kind: type[PreTrainedModel], config: Any) -> PreTrainedModel:
    """Model of the class ``kind`` in the dtype of a graph's weights, with all its weights outside of the FFNs.

    Biases that the graph lacks are zero. The FFNs are left to the caller.

    Args:
        graph: expert graph.
        kind: class of a causal language model with Llama's module names.
        config: configuration of this class.

    Raises:
        UserError: the class has no place for a weight of the graph, e.g. a bias that is not zero.
    """
    config.dtype = graph.dtype
    with no_init_weights():
        model: Any = kind(config).eval()
    model.tie_weights()
    for parameter in model.parameters():  # without the buffers: rotary frequencies stay in fp32
        parameter.data = parameter.data.to(graph.dtype)
    for name, parameter in model.named_parameters():
        if name.endswith(".bias"):
            parameter.zero_()
    model.generation_config = copy.deepcopy(graph.generation_config)
    rest = {name: value for name, value in graph.state_dict().items() if ".mlp." not in name}
    report = model.load_state_dict(rest, strict=False)
    if lost := [name for name in report.unexpected_keys if bool(rest[name].any())]:
        raise UserError(
            f"expected weights that {kind.__name__} has, got {lost[0]}; choose another format of the export"
        )
    return model
