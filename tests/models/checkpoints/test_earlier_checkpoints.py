"""Checkpoints that earlier code wrote: ``tests/data/graph_of_earlier_code`` was written by commit 8f1fc9b.

It holds a graph of 4 and 3 experts with random gains, affinities and masks, and what that code computed of it.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM

from federated.protocol.copy_hash import copy_hash
from models.bootstrap.recipe import graph_fingerprint
from models.checkpoints.disk_experts import open_mapped
from models.checkpoints.load import load_causal_lm, load_graph
from models.checkpoints.save import save_checkpoint
from models.files.fingerprint import checkpoint_fingerprint
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM, FedGraftModel
from tests.support.paths import ROOT

FOLDER = ROOT / "tests/data/graph_of_earlier_code"
EXPECTED = load_file(FOLDER / "expected.safetensors")
FACTS = json.loads((FOLDER / "expected.json").read_text())
LOADERS = {
    "load_graph": load_graph,
    "load_causal_lm": load_causal_lm,
    "open_mapped": open_mapped,
    "AutoModel": AutoModelForCausalLM.from_pretrained,
    "own class": FedGraftForCausalLM.from_pretrained,
}


@torch.no_grad()
def assert_computes_the_same(model) -> None:
    ids = EXPECTED["input_ids"]
    torch.testing.assert_close(model(input_ids=ids).logits, EXPECTED["logits"], rtol=1e-4, atol=1e-4)
    # Token by token, as generation runs it.
    cache, steps = None, []
    for token in ids[:1].split(1, dim=1):
        output = model(input_ids=token, past_key_values=cache, use_cache=True)
        cache = output.past_key_values
        steps.append(output.logits)
    torch.testing.assert_close(torch.cat(steps, 1), EXPECTED["logits"][:1], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("loader", LOADERS)
def test_every_loader_gives_the_stored_logits(loader):
    model = LOADERS[loader](str(FOLDER))
    assert type(model) is FedGraftForCausalLM
    assert_computes_the_same(model)
    assert copy_hash(model, {}) == FACTS["copy_hash"]


def test_the_decoder_alone_loads_and_saves_too(tmp_path):
    model = FedGraftModel.from_pretrained(str(FOLDER))
    weight = load_file(FOLDER / "model.safetensors")["model.layers.1.mlp.router"]
    assert torch.equal(model.layers[1].mlp.router.weight, weight)
    model.save_pretrained(tmp_path)
    assert torch.equal(load_file(tmp_path / "model.safetensors")["layers.1.mlp.router"], weight)


def test_the_fingerprint_of_the_checkpoint_is_what_it_was():
    assert graph_fingerprint(str(FOLDER)) == FACTS["graph_fingerprint"]


@pytest.mark.parametrize("loader", ["load_graph", "AutoModel"])
def test_saving_it_again_writes_the_same_tensors_under_the_same_names(tmp_path, loader, tiny_tokenizer):
    save_checkpoint(LOADERS[loader](str(FOLDER)), tiny_tokenizer, tmp_path)
    assert load_file(tmp_path / "model.safetensors").keys() == load_file(FOLDER / "model.safetensors").keys()
    assert checkpoint_fingerprint(str(tmp_path)) == checkpoint_fingerprint(str(FOLDER))
    assert graph_fingerprint(str(tmp_path)) == FACTS["graph_fingerprint"]


def test_the_router_of_a_bf16_load_stays_in_fp32():
    model = load_graph(str(FOLDER), dtype=torch.bfloat16)
    stored = load_file(FOLDER / "model.safetensors")
    for index, layer in enumerate(model.expert_layers()):
        assert layer.gate_up_proj.dtype == torch.bfloat16
        assert torch.equal(layer.router.weight, stored[f"model.layers.{index}.mlp.router"])


def test_the_code_that_its_auto_map_names_opens_it_outside_of_this_project(tmp_path):
    folder = tmp_path / "graph"
    shutil.copytree(FOLDER, folder)
    for path in (ROOT / "models/remote_code").glob("*_fedgraft.py"):
        shutil.copy(path, folder)
    script = (
        "import sys, torch; from safetensors.torch import load_file, save_file;"
        "from transformers import AutoModelForCausalLM;"
        "model = AutoModelForCausalLM.from_pretrained(sys.argv[1], trust_remote_code=True);"
        "ids = load_file(sys.argv[1] + '/expected.safetensors')['input_ids'];"
        "assert type(model).__module__.startswith('transformers_modules');"
        "save_file({'logits': model(input_ids=ids).logits.detach()}, sys.argv[1] + '/got.safetensors')"
    )
    command = [sys.executable, "-c", script, str(folder)]
    environment = {"HF_HOME": str(tmp_path / "home"), "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    got = load_file(folder / "got.safetensors")["logits"]
    torch.testing.assert_close(got, EXPECTED["logits"], rtol=1e-4, atol=1e-4)
