"""Loading of checkpoints: dense Llamas, expert graphs, and other causal language models of transformers."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from configs.choices import Precision, check_choice
from configs.errors import UserError, first_line
from models.checkpoints.disk_experts import open_mapped
from models.checkpoints.save import cast_weights
from models.files.config_file import check_is_dense, check_is_graph, read_config
from models.files.safetensors_files import check_file, checkpoint_files
from models.files.tied_head import record_own_head
from models.graph.expert_modules import materialize_modules
from models.graph.graph_state import check_graph
from models.remote_code.configuration_fedgraft import FedGraftConfig
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.runtime.nf4 import compute_dtype, quantization_config, replace_linear4bit
from models.runtime.precision import faster_dtype

_DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16}

# Graphs open with these classes and not with the modeling code in the checkpoint.
AutoModelForCausalLM.register(FedGraftConfig, FedGraftForCausalLM)


def load_dense(
    source: str,
    *,
    dtype: torch.dtype | str = "auto",
    precision: str | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load a dense Llama from a directory or a hub id.

    Args:
        source: directory or hub id.
        dtype: dtype of the weights; ``auto`` for that of the checkpoint. With ``nf4``: dtype of the matrix products and
            of unquantized weights; ``auto`` for bf16 if it is faster on the device, else fp32.
        precision: ``fp32``, ``bf16``, ``nf4`` (4-bit linear layers except the output head), or ``auto``: as stored, but
            fp32 in place of 16 bits where the device is faster with it (see ``faster_dtype``); None to use ``dtype``.
        device: device of the model.

    Raises:
        UserError: no such checkpoint, not a Llama, biased FFN, weights missing or damaged, unknown precision.
    """
    check_is_dense(read_config(source), source)
    return _load(AutoModelForCausalLM, source, dtype, precision, device)


def load_graph(
    source: str,
    *,
    dtype: torch.dtype | str = "auto",
    precision: str | None = None,
    device: torch.device | str = "cpu",
) -> FedGraftForCausalLM:
    """Load an expert graph from a directory or a hub id.

    Args:
        source: directory or hub id.
        dtype: as in ``load_dense``.
        precision: as in ``load_dense``; with ``nf4`` experts and attention are 4-bit modules
            (see ``models.graph.expert_modules``), quantized one at a time.
        device: device of the model.

    Raises:
        UserError: no such checkpoint, not an expert graph, weights missing or damaged, masks that are not
            upper-triangular or leave an expert unreachable, unknown precision.
    """
    check_is_graph(read_config(source), source)
    if precision != "nf4":
        graph = _load(FedGraftForCausalLM, source, dtype, precision, device)
        check_graph(graph)
        return graph
    products = _product_dtype(dtype, device)
    model = cast_weights(open_mapped(source), products).to(device)
    materialize_modules(model, [None] * len(model.expert_layers()), kind="nf4", dtype=products)
    return model.eval()


def load_causal_lm(
    source: str,
    *,
    dtype: torch.dtype | str = "auto",
    precision: str | None = None,
    device: torch.device | str = "cpu",
) -> PreTrainedModel:
    """Load an expert graph or any causal language model that transformers supports; see ``load_dense``."""
    if read_config(source).model_type == FedGraftConfig.model_type:
        return load_graph(source, dtype=dtype, precision=precision, device=device)
    return _load(AutoModelForCausalLM, source, dtype, precision, device)


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    """Load the tokenizer of a checkpoint.

    Raises:
        UserError: there is none.
    """
    try:
        return AutoTokenizer.from_pretrained(source)
    except (OSError, ValueError, KeyError) as error:
        raise UserError(
            f"expected a tokenizer beside the model in {source}, got: {first_line(error)}"
        ) from error


def check_weights(source: str) -> None:
    """Check the headers of the weight files of a checkpoint directory; hub ids are not checked.

    Raises:
        UserError: there are none, or one is missing, truncated or damaged in its header.
    """
    if not Path(source).is_dir():
        return
    for file in checkpoint_files(source):
        check_file(file)


def _load(
    kind: Any, source: str, dtype: torch.dtype | str, precision: str | None, device: torch.device | str
) -> Any:
    options = {"output_loading_info": True, "ignore_mismatched_sizes": True}
    options |= _dtype_options(dtype, precision, device)
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
    record_own_head(model)
    if precision == "auto":
        _widen_if_faster(model, torch.device(device))
    return (replace_linear4bit(model) if precision == "nf4" else model.to(device)).eval()


def _widen_if_faster(model: PreTrainedModel, device: torch.device) -> None:
    """Cast 16-bit weights to fp32 if the device is faster with it; ``config.dtype`` keeps the stored dtype."""
    stored = model.dtype
    if not getattr(model, "is_quantized", False) and faster_dtype(stored, device.type) != stored:
        cast_weights(model, torch.float32)
        model.config.dtype = stored


def _dtype_options(
    dtype: torch.dtype | str, precision: str | None, device: torch.device | str
) -> dict[str, Any]:
    if precision is not None:
        check_choice("`precision`", precision, Precision)
    if precision == "nf4":
        products = _product_dtype(dtype, device)
        return {
            "dtype": products,
            "quantization_config": quantization_config(products),
            "device_map": {"": device},
        }
    return {"dtype": _DTYPES.get(precision or "", dtype)}


def _product_dtype(dtype: torch.dtype | str, device: torch.device | str) -> torch.dtype:
    return dtype if isinstance(dtype, torch.dtype) else compute_dtype(device)
