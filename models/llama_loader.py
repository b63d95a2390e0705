"""Opening checkpoints: dense Llamas, expert graphs, and any causal language model that Hugging Face knows."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from huggingface_hub.errors import HFValidationError, StrictDataclassError
from safetensors import SafetensorError
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from configs.errors import UserError
from models.configuration_fedgraft import FedGraftConfig
from models.fingerprint import check_file, checkpoint_files
from models.fingerprint import fingerprint as fingerprint
from models.fingerprint import first_line
from models.modeling_fedgraft import FedGraftForCausalLM

SUPPORTED_DENSE = ("llama",)

# With the classes known here, a graph's own copy of the modelling code is never run by us.
AutoConfig.register(FedGraftConfig.model_type, FedGraftConfig)
AutoModelForCausalLM.register(FedGraftConfig, FedGraftForCausalLM)


def load_dense(source: str, *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load a dense Llama from a directory or a hub id.

    Raises:
        UserError: no such checkpoint, not a Llama, biased FFN, weights missing or damaged.
    """
    config = read_config(source)
    if config.model_type not in SUPPORTED_DENSE:
        raise UserError(
            f"expected a dense model of type {', '.join(SUPPORTED_DENSE)}, got {config.model_type!r} in {source}"
        )
    if config.mlp_bias:
        raise UserError(
            f"expected an FFN without bias, got mlp_bias=true in {source}; such Llamas are not supported"
        )
    return _load(AutoModelForCausalLM, source, dtype=dtype)


def load_graph(source: str, *, dtype: torch.dtype | str = "auto") -> FedGraftForCausalLM:
    """Load an expert graph that ``fedgraft bootstrap`` or a federation wrote.

    Raises:
        UserError: no such checkpoint, not an expert graph, weights missing or damaged.
    """
    check_is_graph(read_config(source), source)
    return _load(FedGraftForCausalLM, source, dtype=dtype)


def check_is_graph(config: PreTrainedConfig, source: str) -> None:
    """Refuse the configuration of anything but an expert graph.

    Raises:
        UserError: names the type that came.
    """
    if config.model_type != FedGraftConfig.model_type:
        raise UserError(
            f"expected an expert graph, got a model of type {config.model_type!r} in {source}; "
            "make one with `fedgraft bootstrap --model DIR --experts E --out DIR`"
        )


def load_causal_lm(source: str, *, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """Load an expert graph or any causal language model that Hugging Face's own classes open."""
    if read_config(source).model_type == FedGraftConfig.model_type:
        return load_graph(source, dtype=dtype)
    return _load(AutoModelForCausalLM, source, dtype=dtype)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer beside a checkpoint.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"expected a tokenizer beside the model in {source}, got: {first_line(error)}"
        ) from error


def read_config(source: str) -> PreTrainedConfig:
    """Read ``config.json`` of a checkpoint without opening its weights.

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


def check_weights(source: str) -> None:
    """Open the weight files of a checkpoint folder without reading them; a hub id passes unseen.

    Raises:
        UserError: there are none, or one is missing, cut short or damaged in its header.
    """
    if not Path(source).is_dir():
        return
    for file in checkpoint_files(source):
        check_file(file)


def read_dtype(source: str) -> torch.dtype:
    """The dtype in which a checkpoint's weights are stored; fp32 where its configuration does not say."""
    dtype = read_config(source).dtype or torch.float32
    return getattr(torch, dtype) if isinstance(dtype, str) else dtype


def _load(kind: Any, source: str, *, dtype: torch.dtype | str) -> Any:
    options = {"dtype": dtype, "output_loading_info": True, "ignore_mismatched_sizes": True}
    try:
        model, report = kind.from_pretrained(source, **options)
    except (OSError, RuntimeError, ValueError, SafetensorError) as error:
        raise UserError(
            f"expected whole safetensors weights in {source}, got: {first_line(error)}"
        ) from error
    missing = sorted(report["missing_keys"]) + sorted(key[0] for key in report["mismatched_keys"])
    if missing:
        named = ", ".join(missing[:3]) + (f" and {len(missing) - 3} more" if len(missing) > 3 else "")
        raise UserError(
            f"expected every weight that config.json describes in {source}, got none or another shape for {named}; "
            "the checkpoint is incomplete"
        )
    return model.eval()
