"""Reading and writing an expert graph as a Hugging Face checkpoint that carries its own modeling code."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

import torch
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from models.remote_code.configuration_fedgraft import FedGraftConfig
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


def save_graph(
    graph: FedGraftForCausalLM,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights, graph, configuration, modeling code and tokenizer into an existing directory.

    Args:
        graph: what is written.
        tokenizer: of the model.
        directory: receives the files.
        weights: those to write, by name; None for all that ``graph`` holds.
    """
    FedGraftConfig.register_for_auto_class()
    FedGraftForCausalLM.register_for_auto_class("AutoModelForCausalLM")
    graph.save_pretrained(directory, state_dict=None if weights is None else dict(weights))
    tokenizer.save_pretrained(directory)


def cast_weights(model: FedGraftForCausalLM, dtype: torch.dtype) -> FedGraftForCausalLM:
    """Cast a model in place, except for what stays in fp32 whatever the dtype: routers and gains."""
    exact = set(model._keep_in_fp32_modules_strict)
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if exact & set(name.split(".")) else dtype)
    model.config.dtype = dtype
    return model
