"""Building an expert graph from the dense base on this disk and a recipe, a layer at a time."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from safetensors.torch import save_file
from torch import Tensor
from transformers import AutoModelForCausalLM, GenerationConfig, PreTrainedModel
from transformers.utils import SAFE_WEIGHTS_INDEX_NAME, SAFE_WEIGHTS_NAME

from configs.errors import UserError
from configs.output import new_directory, write_bytes, write_json
from models.bootstrap import graph_config
from models.checkpoint import save_graph
from models.config_file import check_is_dense, read_config
from models.fingerprint import check_file, checkpoint_files, fingerprint_of
from models.llama_loader import load_tokenizer
from models.mapped_experts import GraphFiles
from models.modeling_fedgraft import FedGraftForCausalLM
from models.recipe import RECIPE_NAME, Recipe, check_fits, write_recipe


class DenseBase:
    """A dense Llama on the disk, of which one parameter is read at a time.

    Args:
        source: directory or hub id.
        dtype: in which parameters are read.

    Raises:
        UserError: no such checkpoint, not a Llama, an FFN with bias, weights missing or damaged.
    """

    def __init__(self, source: str, dtype: torch.dtype) -> None:
        config = read_config(source)
        check_is_dense(config, source)
        for path in checkpoint_files(source):
            check_file(path)
        self.source, self._dtype, self._files = source, dtype, GraphFiles(source)
        with torch.device("meta"):
            self.model: PreTrainedModel = AutoModelForCausalLM.from_config(config)
        self.model.tie_weights()
        self._shapes = {name: list(value.shape) for name, value in self.model.named_parameters()}
        stored = set(self._files.names())
        for name, shape in self._shapes.items():
            found = self._files.shape(name) if name in stored else None
            if found != shape:
                raise UserError(f"expected {name} of shape {shape} in {source}, got {found or 'none'}")

    def tensor(self, name: str) -> Tensor:
        """A parameter by its name."""
        return self._files.tensor(name).to(self._dtype)

    def fingerprint(self) -> str:
        """What ``models.fingerprint.fingerprint`` says of the model once it is loaded."""
        return fingerprint_of((name, self.tensor(name)) for name in sorted(self._shapes))


def build_from_recipe(base: str, recipe: Recipe, out: Path, *, overwrite: bool = False) -> None:
    """Make the graph folder that ``fedgraft bootstrap`` made when it wrote the recipe: every tensor bit for bit.

    Weights lie in a file per layer; at most a layer of them is in memory.

    Args:
        base: directory or hub id of the dense model.
        recipe: of the graph.
        out: folder to make; nothing is there until all of it is.
        overwrite: replace ``out`` if it is not empty.

    Raises:
        UserError: no such base, other weights or shapes than those the recipe was made from.
    """
    with new_directory(out, overwrite=overwrite) as directory:
        build_into(base, recipe, directory)


def build_into(base: str, recipe: Recipe, directory: Path) -> None:
    """As ``build_from_recipe``, into an existing folder."""
    config = read_config(base)
    check_is_dense(config, base)
    check_fits(recipe, config, base)
    dense = DenseBase(base, getattr(torch, recipe.facts.dtype))
    if (found := dense.fingerprint()) != recipe.facts.base_fingerprint:
        raise UserError(
            f"expected the dense base with fingerprint {recipe.facts.base_fingerprint[:12]}, which the server's graph "
            f"was made from, got {found[:12]} in {base}; name that checkpoint in base"
        )
    graph = _empty_graph(dense, recipe)
    save_graph(graph, load_tokenizer(base), directory, weights={})
    (directory / SAFE_WEIGHTS_NAME).unlink(missing_ok=True)  # of no tensor
    _write_weights(graph, dense, recipe, directory)
    write_bytes(directory / RECIPE_NAME, write_recipe(recipe))


def _empty_graph(dense: DenseBase, recipe: Recipe) -> FedGraftForCausalLM:
    """The graph without any weight, as a description."""
    layers, experts, _ = recipe.neurons.shape
    config = graph_config(dense.model, [experts] * layers, recipe.facts.experts_per_token)
    config.base_fingerprint, config.walk = recipe.facts.base_fingerprint, recipe.facts.walk
    config.dtype = getattr(torch, recipe.facts.dtype)
    with torch.device("meta"):
        graph = FedGraftForCausalLM(config).to(config.dtype)
    try:
        graph.generation_config = GenerationConfig.from_pretrained(dense.source)
    except OSError:
        graph.generation_config = GenerationConfig.from_model_config(dense.model.config)
    return graph


def _write_weights(graph: FedGraftForCausalLM, dense: DenseBase, recipe: Recipe, directory: Path) -> None:
    file_of: dict[str, str] = {}
    count, total = len(recipe.neurons) + 1, 0
    for number, tensors in enumerate(_parts(graph, dense, recipe), start=1):
        name = SAFE_WEIGHTS_NAME.replace(".", f"-{number:05d}-of-{count:05d}.", 1)
        save_file(
            {key: value.contiguous() for key, value in tensors.items()}, directory / name, {"format": "pt"}
        )
        file_of |= dict.fromkeys(tensors, name)
        total += sum(value.nbytes for value in tensors.values())
    write_json(
        directory / SAFE_WEIGHTS_INDEX_NAME,
        {"metadata": {"total_size": total}, "weight_map": dict(sorted(file_of.items()))},
    )


def _parts(graph: FedGraftForCausalLM, dense: DenseBase, recipe: Recipe) -> Iterator[Mapping[str, Tensor]]:
    """The tensors of each file: those outside of the layers, then a layer at a time."""
    names = [name for name, _ in dense.model.named_parameters() if ".mlp." not in name]
    yield {name: dense.tensor(name) for name in names if not name.startswith("model.layers.")}
    for layer in range(len(recipe.neurons)):
        prefix = f"model.layers.{layer}."
        rest = {name: dense.tensor(name) for name in names if name.startswith(prefix)}
        experts = _experts(dense, recipe, layer) | _gains(graph, layer)
        yield rest | {f"{prefix}mlp.{name}": value for name, value in experts.items()}


def _experts(dense: DenseBase, recipe: Recipe, layer: int) -> dict[str, Tensor]:
    members = torch.from_numpy(recipe.neurons[layer].astype("int64"))
    gate, up, down = (
        dense.tensor(f"model.layers.{layer}.mlp.{name}_proj.weight") for name in ("gate", "up", "down")
    )
    return {
        "gate_up_proj": torch.cat([gate[members], up[members]], dim=1),
        "down_proj": down.T[members].transpose(1, 2),
        "router": torch.from_numpy(recipe.routers[layer]),
        "edges": torch.from_numpy(recipe.masks[layer]),
        "neurons": members,
    }


def _gains(graph: FedGraftForCausalLM, layer: int) -> dict[str, Tensor]:
    """Gains and affinities, which start at zero."""
    mlp = graph.expert_layers()[layer]
    return {
        name: torch.zeros(getattr(mlp, name).shape) for name in ("edge_gain", "edge_affinity", "output_gain")
    }
