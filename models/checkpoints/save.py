"""Saving of models as Hugging Face checkpoints, expert graphs with their modeling code, and casts of weights."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TypeVar

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

from models.files.both_spellings import write_both_spellings
from models.files.tokenizer_files import save_tokenizer
from models.remote_code.configuration_fedgraft import FedGraftConfig
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

Model = TypeVar("Model", bound=PreTrainedModel)

# ``save_pretrained`` of a graph writes the modeling code, too.
FedGraftConfig.register_for_auto_class()
FedGraftForCausalLM.register_for_auto_class("AutoModelForCausalLM")


def save_checkpoint(
    model: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase,
    directory: Path,
    *,
    weights: Mapping[str, Tensor] | None = None,
) -> None:
    """Write weights, configuration and tokenizer into an existing directory; of an expert graph its modeling code, too.

    Args:
        model: model of transformers, or expert graph.
        tokenizer: tokenizer of the model.
        directory: directory of the checkpoint.
        weights: weights to write, by name; None for all weights of ``model``.
    """
    model.save_pretrained(directory, state_dict=None if weights is None else dict(weights))
    write_both_spellings(directory)
    save_tokenizer(tokenizer, directory)


def cast_weights(model: Model, dtype: torch.dtype) -> Model:
    """Cast the weights of a model in place, one at a time; modules that stay in fp32 become fp32 for any dtype."""
    exact = set(model._keep_in_fp32_modules_strict or [])
    if dtype == torch.float16:  # the rule of transformers
        exact |= set(model._keep_in_fp32_modules or [])
    for name, parameter in model.named_parameters():
        parameter.data = parameter.data.to(torch.float32 if exact & set(name.split(".")) else dtype)
    model.config.dtype = dtype
    return model
