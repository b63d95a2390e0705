"""Trained Llamas and text of real domains for benchmarks, read from a folder beside the checkout."""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Iterator, Sequence
from functools import cache
from pathlib import Path

import torch
from transformers import PreTrainedTokenizerBase

from benchmarks.support.stored import digest
from configs.errors import UserError
from configs.paths import cache_folder
from federated.data.blocks import Blocks, pack_blocks
from federated.data.documents import load_documents
from federated.data.wikimix import DOMAINS
from models.bootstrap.build import BootstrapOptions, build_graph, plan_experts
from models.bootstrap.pipeline import sample_calibration
from models.checkpoints.load import load_dense, load_tokenizer
from models.checkpoints.save import save_checkpoint
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

SHARED = Path(os.environ.get("FEDGRAFT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
# SmolLM2-135M-Instruct, which a script of the project fetches.
REAL_MODEL = "smollm2-135m-instruct"
DEMO_MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"


def model_path(name: str, *, quick: bool = False) -> str:
    """Folder of the trained Llama ``name``; for a quick run, of the embedded demo model.

    Raises:
        UserError: the folder is absent and this is a full run.
    """
    if quick:
        return str(DEMO_MODEL)
    path = cache_folder() / "models" / name if name == REAL_MODEL else SHARED / "models" / name
    if path.is_dir():
        return str(path)
    fix = (
        "run scripts/tools/real_model.sh"
        if name == REAL_MODEL
        else "set FEDGRAFT_SHARED to the folder of models and data"
    )
    raise UserError(f"expected the model {name} in {path}, got none; {fix}")


@cache
def domain_blocks(
    source: str, model: str, *, split: str = "train", block_size: int = 256, max_blocks: int, seed: int = 0
) -> Blocks:
    """Token blocks of one split of a data source, from its documents in an order drawn with ``seed``.

    Args:
        source: data source, as in a run configuration.
        model: folder of the model whose tokenizer is used.
        split: ``train`` or ``valid``.
        block_size: tokens per block.
        max_blocks: most blocks.
        seed: of the order of the documents.
    """
    texts = _texts(source, split, seed)
    return pack_blocks(texts, load_tokenizer(model), block_size=block_size, max_blocks=max_blocks)


def mixed_blocks(
    sources: Sequence[str],
    model: str,
    *,
    split: str = "train",
    block_size: int = 256,
    max_blocks: int,
    seed: int = 0,
) -> Blocks:
    """Token blocks of several data sources, one source after the other; arguments as of ``domain_blocks`` for each."""
    parts = [
        domain_blocks(source, model, split=split, block_size=block_size, max_blocks=max_blocks, seed=seed)
        for source in sources
    ]
    return Blocks(torch.cat([part.input_ids for part in parts]), torch.cat([part.labels for part in parts]))


def write_client_data(
    folder: Path, source: str, model: str, *, train_tokens: int, valid_tokens: int, seed: int
) -> None:
    """Write the private data of one client, ``train.jsonl`` and ``valid.jsonl``, for ``data-dir`` of its node.

    Args:
        folder: receives the files; it is made.
        source: data source, as in a run configuration.
        model: folder of the model whose tokenizer counts the tokens.
        train_tokens: tokens to train on, BOS of each document included; fewer where the source has fewer.
        valid_tokens: held-out tokens, of the same documents for every ``seed``.
        seed: of the order in which training documents are taken.
    """
    folder.mkdir(parents=True)
    tokenizer = load_tokenizer(model)
    for split, tokens, order in (("train", train_tokens, seed), ("valid", valid_tokens, 0)):
        texts = _up_to(tokens, _texts(source, split, order), tokenizer)
        lines = (json.dumps({"text": text}) + "\n" for text in texts)
        (folder / f"{split}.jsonl").write_text("".join(lines), encoding="utf-8")


def bootstrapped(path: str, experts: int, calibration_tokens: int) -> FedGraftForCausalLM:
    """Expert graph of the Llama in folder ``path``, calibrated on text sampled from the model itself."""
    dense = load_dense(path).float()
    plan = BootstrapOptions(experts)
    ids = sample_calibration(dense, calibration_tokens, 0)
    return build_graph(dense, plan_experts(dense, ids, plan), plan.visits)


def write_bootstrapped(folder: Path, path: str, experts: int, calibration_tokens: int) -> None:
    """Write the graph of ``bootstrapped`` to the new folder ``folder``, with the tokenizer of the model."""
    graph = bootstrapped(path, experts, calibration_tokens)
    folder.mkdir(parents=True)
    save_checkpoint(graph, load_tokenizer(path), folder)


def stored_graph(
    work: Path, *, model: str, experts: int, calibration_tokens: int, seed: int, quick: bool
) -> Path:
    """Folder in ``work`` of the graph of the Llama ``model``, bootstrapped where it is absent.

    Args:
        work: folder of graphs.
        model: name of the dense model; the embedded one is taken for a quick run.
        experts: E of each layer.
        calibration_tokens: tokens sampled from the model.
        seed: of the clusters.
        quick: whether this is a quick run.
    """
    out = work / f"graph-{digest([seed, experts, calibration_tokens, model, quick])}"
    if not out.is_dir():
        torch.manual_seed(seed)
        write_bootstrapped(out, model_path(model, quick=quick), experts, calibration_tokens)
    return out


def data_sources(domains: Sequence[str], *, quick: bool = False) -> list[str]:
    """Data sources of real ``domains``; for a quick run, as many domains of WikiMix.

    Raises:
        UserError: a domain is absent and this is a full run.
    """
    if quick:
        return [f"wikimix:{name}" for name, _ in zip(DOMAINS, domains, strict=False)]
    folders = [SHARED / "data" / domain for domain in domains]
    absent = [folder for folder in folders if not folder.is_dir()]
    if not absent:
        return [str(folder) for folder in folders]
    raise UserError(
        f"expected text in {absent[0]}, got none; set FEDGRAFT_SHARED to the folder of models and data"
    )


def _texts(source: str, split: str, seed: int) -> Iterator[str]:
    rows = load_documents([source], wikimix_documents=400).shuffle(seed=seed)
    return (row["text"] for row in rows if row["split"] == split)


def _up_to(tokens: int, texts: Iterable[str], tokenizer: PreTrainedTokenizerBase) -> Iterator[str]:
    """The first texts, the last one cut so that all have ``tokens`` tokens, a BOS before each included."""
    left = tokens
    for text in texts:
        ends = [
            end
            for _, end in tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)[
                "offset_mapping"
            ]
        ]
        if left < 2:
            return
        yield text if len(ends) < left else text[: ends[left - 2]]
        left -= 1 + len(ends)
