"""Reconstruction of an expert graph from its dense base and a recipe, a layer at a time."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from configs.errors import UserError
from configs.output import new_directory, write_bytes, write_json
from models.bootstrap.build import graph_config
from models.bootstrap.recipe import (
    RECIPE_NAME,
    Recipe,
    check_fits,
    read_recipe,
    read_recipe_file,
    write_recipe,
)
from models.checkpoints.disk_experts import GraphFiles
from models.checkpoints.load import load_tokenizer
from models.checkpoints.save import save_checkpoint
from models.files.config_file import check_is_dense
from models.files.fingerprint import fingerprint_of
from models.files.safetensors_files import check_file, checkpoint_files, weight_bytes
from models.files.tied_head import stored_config
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


class DenseBase:
    """Reader of single parameters of a dense Llama checkpoint.

    Attributes:
        model: the model on the meta device.
        names: names of all parameters, sorted.

    Args:
        source: directory or hub id.
        dtype: dtype of the parameters that ``tensor`` returns.

    Raises:
        UserError: no such checkpoint, not a Llama, an FFN with bias, weights missing or damaged.
    """

    def __init__(self, source: str, dtype: torch.dtype) -> None:
        config = stored_config(source)
        check_is_dense(config, source)
        for path in checkpoint_files(source):
            check_file(path)
        self.source, self._dtype, self._files = source, dtype, GraphFiles(source)
        with torch.device("meta"):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        self.model.tie_weights()
        shapes = {name: list(value.shape) for name, value in self.model.named_parameters()}
        self.names, stored = sorted(shapes), set(self._files.names())
        for name, shape in shapes.items():
            found = self._files.shape(name) if name in stored else None
            if found != shape:
                raise UserError(f"expected {name} of shape {shape} in {source}, got {found or 'none'}")

    def tensor(self, name: str) -> Tensor:
        """Read a parameter by its name."""
        return self._files.tensor(name).to(self._dtype)

    def fingerprint(self) -> str:
        """Fingerprint of the loaded model, see ``models.files.fingerprint.fingerprint``."""
        return fingerprint_of((name, self.tensor(name)) for name in self.names)


def check_base(base: str, graph: str) -> None:
    """Check that the graph in ``graph`` can be rebuilt from ``base``, without reading the weights of its layers.

    Args:
        base: directory or hub id of a dense model.
        graph: directory or hub id of a graph.

    Raises:
        UserError: no dense model, a graph without a recipe, or a recipe of another base.
    """
    config = stored_config(base)
    check_is_dense(config, base)
    recipe = read_recipe_file(graph)
    if not recipe:
        raise UserError(
            f"expected {RECIPE_NAME} in {graph}, from which clients build it, got none; run `fedgraft bootstrap` "
            "again, or leave base empty and give the clients the graph folder"
        )
    check_fits(read_recipe(recipe), config, base)


def build_from_recipe(base: str, recipe: Recipe, out: Path, *, overwrite: bool = False) -> None:
    """Write the checkpoint that a recipe describes, every tensor bit for bit as ``fedgraft bootstrap`` wrote it.

    Weights are stored in one file per layer; at most one layer is in memory.

    Args:
        base: directory or hub id of the dense model.
        recipe: recipe of the graph.
        out: new directory; it appears when the checkpoint is complete.
        overwrite: replace ``out`` if it is not empty.

    Raises:
        UserError: no such base, a base of other weights or shapes than the recipe's, or no room for ``out``.
    """
    with new_directory(out, overwrite=overwrite, size=weight_bytes(base)) as directory:
        build_into(base, recipe, directory)


def build_into(base: str, recipe: Recipe, directory: Path) -> None:
    """Write the checkpoint of ``build_from_recipe`` into an existing directory."""
    config = stored_config(base)
    check_is_dense(config, base)
    check_fits(recipe, config, base)
    dense = DenseBase(base, getattr(torch, recipe.facts.dtype))
    if (found := dense.fingerprint()) != recipe.facts.base_fingerprint:
        raise UserError(
            f"expected the dense base with fingerprint {recipe.facts.base_fingerprint[:12]}, which the server's graph "
            f"was made from, got {found[:12]} in {base}; name that checkpoint in base"
        )
    graph = _empty_graph(dense, recipe)
    save_checkpoint(graph, load_tokenizer(base), directory, weights={})
    (directory / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # it holds no tensor
    _write_weights(dense, recipe, directory)
    write_bytes(directory / RECIPE_NAME, write_recipe(recipe))


def _empty_graph(dense: DenseBase, recipe: Recipe) -> FedGraftForCausalLM:
    """The graph on the meta device."""
    layers, experts, _ = recipe.neurons.shape
    config = graph_config(dense.model, [experts] * layers, recipe.facts.experts_per_token)
    config.num_shared = [recipe.facts.num_shared] * layers
    config.default_rank = recipe.facts.default_rank
    config.base_fingerprint, config.walk = recipe.facts.base_fingerprint, recipe.facts.walk
    config.dtype = getattr(torch, recipe.facts.dtype)
    with torch.device("meta"):
        graph = FedGraftForCausalLM(config).to(config.dtype)
    graph.generation_config = _generation_config(dense.source)
    return graph


def _generation_config(source: str) -> GenerationConfig:
    """Generation configuration as ``from_pretrained`` of a model reads it."""
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return GenerationConfig.from_pretrained(
            source, config_file_name="config.json", _from_model_config=True
        )


def _write_weights(dense: DenseBase, recipe: Recipe, directory: Path) -> None:
    """Write a file of the tensors outside of the layers, then one per layer, and the index."""
    count = len(recipe.neurons) + 1
    file_of: dict[str, str] = {}
    total = 0
    for number in range(count):
        name = SAFE_WEIGHTS_NAME.replace(".", f"-{number + 1:05d}-of-{count:05d}.", 1)
        tensors = _layer(dense, recipe, number - 1) if number else _outside(dense)
        save_file(tensors, directory / name, {"format": "pt"})
        file_of |= dict.fromkeys(tensors, name)
        total += sum(value.nbytes for value in tensors.values())
        del tensors  # frees the layer before the next is read
    write_json(
        directory / SAFE_WEIGHTS_INDEX_NAME,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))},
    )


def _outside(dense: DenseBase) -> dict[str, Tensor]:
    return {name: dense.tensor(name) for name in dense.names if not name.startswith("model.layers.")}


def _layer(dense: DenseBase, recipe: Recipe, layer: int) -> dict[str, Tensor]:
    prefix = f"model.layers.{layer}."
    tensors = {
        name: dense.tensor(name) for name in dense.names if name.startswith(prefix) and ".mlp." not in name
    }
    members, masks = torch.from_numpy(recipe.neurons[layer].astype(np.int64)), recipe.masks[layer]
    experts = {
        **_expert_weights(dense, f"{prefix}mlp.", members),
        "router": torch.from_numpy(recipe.routers[layer]),
        "edges": torch.from_numpy(masks),
        "neurons": members,
        # Zero at bootstrap.
        "edge_gain": torch.zeros(masks.shape),
        "edge_affinity": torch.zeros(masks.shape),
        "output_gain": torch.zeros(len(masks)),
        **{
            f"default.{name}": torch.from_numpy(values[layer]).to(getattr(torch, recipe.facts.dtype))
            for name, values in recipe.defaults.items()
        },
    }
    return tensors | {f"{prefix}mlp.{name}": value for name, value in experts.items()}


def _expert_weights(dense: DenseBase, prefix: str, members: Tensor) -> dict[str, Tensor]:
    """``gate_up_proj [E, 2H, D]`` and ``down_proj [E, D, H]`` of experts with the neurons ``members [E, H]``.

    Rows are copied an expert at a time, so that a layer is in memory only once.
    """
    gate, up = dense.tensor(f"{prefix}gate_proj.weight"), dense.tensor(f"{prefix}up_proj.weight")
    (experts, size), width = members.shape, gate.shape[1]
    gate_up = torch.empty(experts, 2 * size, width, dtype=gate.dtype)
    for target, rows in zip(gate_up, members, strict=True):
        torch.cat([gate[rows], up[rows]], out=target)
    del gate, up
    down = dense.tensor(f"{prefix}down_proj.weight")
    down_proj = torch.empty(experts, width, size, dtype=down.dtype)
    for target, rows in zip(down_proj, members, strict=True):
        target.copy_(down[:, rows])
    return {"gate_up_proj": gate_up, "down_proj": down_proj}
