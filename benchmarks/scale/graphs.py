"""Expert graphs of the sizes: of the embedded demo model, or of random weights."""

from __future__ import annotations

import json
from pathlib import Path

import torch
from transformers import LlamaConfig, LlamaForCausalLM

from benchmarks.scale.settings import Size
from benchmarks.support.material import DEMO_MODEL, write_bootstrapped
from benchmarks.support.runner import ROOT
from benchmarks.support.stored import digest
from models.checkpoints.load import load_tokenizer
from models.checkpoints.save import save_checkpoint


def graph_of(size: Size, work: Path, calibration_tokens: int) -> Path:
    """Folder in ``work`` of the bootstrapped graph of a size, made where it is absent."""
    out = work / f"graph-{size.name}-{digest([vars(size), calibration_tokens])}"
    if not out.is_dir():
        torch.manual_seed(0)
        dense = DEMO_MODEL if size.trained else random_llama(size, work / f"dense-{size.name}")
        write_bootstrapped(out, str(dense), size.experts, calibration_tokens)
    return out


def random_llama(size: Size, folder: Path) -> Path:
    """Write a Llama of a size with random weights and the demo model's tokenizer; returns its folder."""
    values = json.loads((ROOT / "configs" / "llama_demo.json").read_text(encoding="utf-8"))
    heads = size.hidden // 16 if size.hidden < values["hidden_size"] else size.hidden // values["head_dim"]
    values |= {
        "hidden_size": size.hidden,
        "intermediate_size": size.intermediate,
        "num_hidden_layers": size.layers,
        "num_attention_heads": heads,
        "head_dim": size.hidden // heads,
    }
    folder.mkdir(parents=True, exist_ok=True)
    save_checkpoint(LlamaForCausalLM(LlamaConfig(**values)), load_tokenizer(str(DEMO_MODEL)), folder)
    return folder
