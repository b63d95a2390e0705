"""What tests share: a tiny Llama with a tokenizer, made once a session, and the real data beside the checkout."""

from __future__ import annotations

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedTokenizerFast

from configs.paths import cache_folder
from tests.support.paths import SHARED

_USER_CACHE = cache_folder()


@pytest.fixture(autouse=True)
def _one_thread():
    """Tests run beside each other: more threads than cores stall OpenMP."""
    torch.set_num_threads(1)


@pytest.fixture(scope="session", autouse=True)
def _own_cache(tmp_path_factory):
    """What tests leave in the user's cache folder goes to one of their own."""
    os.environ["FEDGRAFT_CACHE"] = str(tmp_path_factory.mktemp("cache"))


@pytest.fixture
def little_room(monkeypatch):
    """File systems with 100 bytes free, where output paths are checked."""
    monkeypatch.setattr("configs.output.shutil.disk_usage", lambda path: SimpleNamespace(free=100))


@pytest.fixture(scope="session")
def tiny_tokenizer() -> PreTrainedTokenizerFast:
    """A tokenizer of 64 entries: BOS, EOS, unknown, and single characters."""
    characters = "\n abcdefghijklmnopqrstuvwxyz0123456789.,:;!?'\"()+-*/=#{}[]"
    vocabulary = {token: index for index, token in enumerate(["<s>", "</s>", "<unk>", *characters])}
    vocabulary |= {f"<{index}>": index for index in range(len(vocabulary), 64)}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    tokenizer.decoder = decoders.Fuse()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def tiny_llama(**overrides) -> LlamaForCausalLM:
    """A Llama of 2 layers, width 32, FFN 64, vocabulary 64, with weights large enough that experts differ."""
    shape = {
        "vocab_size": 64,
        "hidden_size": 32,
        "intermediate_size": 64,
        "num_hidden_layers": 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "max_position_embeddings": 128,
        "initializer_range": 0.2,
        "bos_token_id": 0,
        "eos_token_id": 1,
    }
    torch.manual_seed(0)
    return LlamaForCausalLM(LlamaConfig(**{**shape, **overrides})).eval()


@pytest.fixture(scope="session")
def tiny_llama_dir(tmp_path_factory, tiny_tokenizer) -> Path:
    """A saved ``tiny_llama`` with its tokenizer."""
    directory = tmp_path_factory.mktemp("tiny-llama")
    tiny_llama().save_pretrained(directory)
    tiny_tokenizer.save_pretrained(directory)
    return directory


@pytest.fixture(scope="session")
def tiny_graph_dir(tmp_path_factory, tiny_llama_dir) -> Path:
    """The tiny Llama as a graph of 4 experts a layer, 2 a token."""
    from models.bootstrap.build import BootstrapOptions
    from models.bootstrap.pipeline import bootstrap_checkpoint

    directory = tmp_path_factory.mktemp("tiny-graph") / "graph"
    bootstrap_checkpoint(
        source=str(tiny_llama_dir),
        out=directory,
        options=BootstrapOptions(num_experts=4),
        calibration_ids=None,
        calibration_tokens=1024,
        evaluation_tokens=512,
    )
    return directory


@pytest.fixture(scope="session")
def shared_graph_dir(tmp_path_factory, tiny_llama_dir) -> Path:
    """The tiny Llama as a graph of 8 experts a layer, 2 of them shared, 4 a token, with default outputs of rank 3."""
    from models.bootstrap.build import BootstrapOptions
    from models.bootstrap.pipeline import bootstrap_checkpoint

    directory = tmp_path_factory.mktemp("shared-graph") / "graph"
    bootstrap_checkpoint(
        source=str(tiny_llama_dir),
        out=directory,
        options=BootstrapOptions(num_experts=8, router="contribution", num_shared=2, default_rank=3),
        calibration_ids=None,
        calibration_tokens=1024,
        evaluation_tokens=512,
        report="none",
    )
    return directory


@pytest.fixture(scope="session")
def smollm2_dir() -> Path:
    """SmolLM2-135M-Instruct in the user's cache folder; the test is skipped where it is absent."""
    folder = _USER_CACHE / "models" / "smollm2-135m-instruct"
    if not (folder / "tokenizer.json").is_file():
        pytest.skip("needs SmolLM2-135M-Instruct, which scripts/tools/real_model.sh makes")
    return folder


def shared_path(name: str) -> Path:
    """A folder of the real data beside the checkout; the test is skipped where it is absent."""
    path = SHARED / name
    if not path.exists():
        pytest.skip(f"needs {name} beside the checkout, which is not there")
    return path
