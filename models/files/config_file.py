"""Configuration file of a checkpoint, read without its weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from transformers import AutoConfig, PreTrainedConfig

from configs.errors import UserError, first_line
from models.remote_code.configuration_fedgraft import FedGraftConfig

AutoConfig.register(FedGraftConfig.model_type, FedGraftConfig)

SUPPORTED_DENSE = ("llama",)


def read_config(source: str) -> PreTrainedConfig:
    """Read ``config.json`` of a checkpoint.

    Raises:
        UserError: no such checkpoint, or a configuration that cannot be read.
    """
    path = Path(source) / "config.json"
    try:
        values = json.loads(path.read_text()) if path.is_file() else {}
        if not isinstance(values, dict):
            raise ValueError("config.json holds no JSON object")
        if values.get("model_type") == FedGraftConfig.model_type:
            return FedGraftConfig.from_pretrained(source)
        return AutoConfig.from_pretrained(source)
    except (OSError, ValueError, KeyError, TypeError, HFValidationError, StrictDataclassError) as error:
        raise UserError(
            f"expected a checkpoint directory with config.json or a hub id, got {source}: {first_line(error)}"
        ) from error


def check_is_graph(config: PreTrainedConfig, source: str) -> None:
    """Check that a configuration is of an expert graph.

    Raises:
        UserError: names the other type.
    """
    if config.model_type != FedGraftConfig.model_type:
        raise UserError(
            f"expected an expert graph, got a model of type {config.model_type!r} in {source}; "
            "make one with `fedgraft bootstrap --model DIR --experts E --out DIR`"
        )


def check_is_dense(config: PreTrainedConfig, source: str) -> None:
    """Check that a configuration is of a dense model that can become an expert graph.

    Raises:
        UserError: names the other type or the unsupported option.
    """
    if config.model_type not in SUPPORTED_DENSE:
        raise UserError(
            f"expected a dense model of type {', '.join(SUPPORTED_DENSE)}, got {config.model_type!r} in {source}"
        )
    if config.mlp_bias:
        raise UserError(
            f"expected an FFN without bias, got mlp_bias=true in {source}; such Llamas are not supported"
        )


def read_dtype(source: str) -> torch.dtype:
    """Dtype of a checkpoint's weights; fp32 if its configuration names none."""
    dtype = read_config(source).dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype
