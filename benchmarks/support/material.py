"""Models and text for benchmarks: trained Llamas and real domains in a folder beside the checkout."""

from __future__ import annotations

import os
from collections.abc import Sequence
from functools import cache
from pathlib import Path

from configs.errors import UserError
from federated.data.blocks import Blocks, pack_blocks
from federated.data.documents import load_documents
from federated.data.wikimix import DOMAINS
from models.bootstrap.build import BootstrapOptions, build_graph, plan_experts
from models.bootstrap.pipeline import sample_calibration
from models.checkpoints.load import load_dense, load_tokenizer
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

SHARED = Path(os.environ.get("FEDGRAFT_SHARED", Path(__file__).resolve().parents[3] / "shared"))
DEMO_MODEL = Path(__file__).resolve().parents[2] / "models" / "demo"


def model_path(name: str, *, quick: bool = False) -> str:
    """Folder of the trained Llama ``name``; a quick run takes the embedded demo model.

    Raises:
        UserError: it is absent and this is a full run.
    """
    if quick:
        return str(DEMO_MODEL)
    path = SHARED / "models" / name
    if path.is_dir():
        return str(path)
    raise UserError(
        f"expected the model {name} in {path}, got none; set FEDGRAFT_SHARED to the folder of models and data"
    )


@cache
def domain_blocks(
    source: str, model: str, *, split: str = "train", block_size: int = 256, max_blocks: int, seed: int = 0
) -> Blocks:
    """Blocks of one split of a data source, documents in an order of ``seed``, tokenized for ``model``."""
    rows = load_documents([source], wikimix_documents=400).shuffle(seed=seed)
    texts = (row["text"] for row in rows if row["split"] == split)
    return pack_blocks(texts, load_tokenizer(model), block_size=block_size, max_blocks=max_blocks)


def bootstrapped(path: str, experts: int, calibration_tokens: int) -> FedGraftForCausalLM:
    """The graph of the Llama in ``path``, calibrated on text of the model itself."""
    dense = load_dense(path).float()
    plan = BootstrapOptions(experts)
    ids = sample_calibration(dense, calibration_tokens, 0)
    return build_graph(dense, plan_experts(dense, ids, plan), plan.visits)


def data_sources(domains: Sequence[str], *, quick: bool = False) -> list[str]:
    """Data sources of real ``domains``; a quick run takes as many domains of WikiMix.

    Raises:
        UserError: one is absent and this is a full run.
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
