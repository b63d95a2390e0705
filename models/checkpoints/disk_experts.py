"""Expert graphs whose experts stay on disk and are read when they run, so that memory holds a part of the graph."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Protocol

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import GenerationConfig
from transformers.initialization import no_init_weights

from configs.errors import UserError
from models.files.config_file import check_is_graph
from models.files.safetensors_files import checkpoint_files, read_stored, stored_tensors
from models.files.tied_head import stored_config
from models.graph.graph_state import check_graph
from models.graph.runtime_settings import held_experts
from models.graph.unit_vectors import flatten_weights, unflatten_weights
from models.remote_code.execution_fedgraft import gated_ffn
from models.remote_code.experts_fedgraft import ExpertGraphMLP
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.remote_code.router_fedgraft import opened_name, stored_name

_EXPERT_WEIGHTS = re.compile(r"model\.layers\.\d+\.mlp\.(gate_up_proj|down_proj)")


class MovedExperts(Protocol):
    """Storage of experts whose weights differ from the checkpoint."""

    def read(self, unit: tuple[int, int]) -> Tensor | None:
        """Weights ``[3hd]`` fp32 of the unit ``(layer, expert)``; None if they are those of the checkpoint."""

    def write(self, unit: tuple[int, int], weights: Tensor) -> None:
        """Store new weights ``[3hd]`` of the unit."""

    def renumber(self, layer: int, origin: Sequence[int]) -> None:
        """Give the experts of a layer new numbers: ``origin[e]`` is the present number of e; -1: a new one."""


class GraphFiles:
    """Reader of single tensors and experts of a checkpoint, each with plain reads of its bytes.

    Args:
        source: directory or hub id.

    Raises:
        UserError: no weights there, or a damaged file.
    """

    def __init__(self, source: str) -> None:
        paths = checkpoint_files(source)
        self._stored = {tensor.name: tensor for path in paths for tensor in stored_tensors(path)}

    def names(self) -> list[str]:
        """Names of all tensors, sorted."""
        return sorted(self._stored)

    def tensor(self, name: str) -> Tensor:
        """Read a whole tensor by its stored name."""
        return read_stored(self._stored[name])

    def expert(self, layer: int, expert: int) -> tuple[Tensor, Tensor]:
        """``gate_up [2h, d]`` and ``down [d, h]`` of one expert, in the checkpoint's dtype."""
        gate_up, down = (
            read_stored(self._stored[f"model.layers.{layer}.mlp.{name}"], expert)
            for name in ("gate_up_proj", "down_proj")
        )
        return gate_up, down

    def shape(self, name: str) -> list[int]:
        """Shape of a tensor."""
        return self._stored[name].shape


class MappedExperts:
    """Storage of one layer (see ``ExpertStorage``) that reads an expert from disk each time it runs.

    Args:
        layer: layer of the experts.
        files: files of the checkpoint.
        moved: experts with other weights than the checkpoint; None for none.
    """

    def __init__(self, layer: ExpertGraphMLP, files: GraphFiles, moved: MovedExperts | None) -> None:
        self._layer, self._files, self._moved = layer.layer_index, files, moved
        self._act_fn, self._hidden_size = layer.act_fn, layer.hidden_size
        self._shapes = (2 * layer.expert_size, layer.hidden_size), (layer.hidden_size, layer.expert_size)
        self._stored = list(range(layer.num_experts))  # number in the checkpoint; -1: not in there

    def run(self, expert: int, rows_ND: Tensor) -> Tensor:
        """Output ``[N, D]``; the backward pass, which reaches only the rows, reads the expert again."""
        if not torch.is_grad_enabled():
            return self._run(expert, rows_ND)
        return checkpoint(self._run, expert, rows_ND, use_reentrant=False, preserve_rng_state=False)

    def read(self, expert: int) -> tuple[Tensor, Tensor]:
        """``gate_up [2h, d]`` and ``down [d, h]``, fp32."""
        moved = self._moved.read((self._layer, expert)) if self._moved is not None else None
        if moved is not None:
            return unflatten_weights(moved, self._hidden_size)
        if self._stored[expert] < 0:
            gate_up, down = (torch.zeros(shape) for shape in self._shapes)
            return gate_up, down
        gate_up, down = self._files.expert(self._layer, self._stored[expert])
        return gate_up.float(), down.float()

    def write(self, expert: int, gate_up: Tensor, down: Tensor) -> None:
        """Store new weights of an expert.

        Raises:
            ValueError: the graph was opened read-only.
        """
        if self._moved is None:
            raise ValueError(
                "expected a graph with storage for moved experts, got one opened for reading only"
            )
        self._moved.write((self._layer, expert), flatten_weights(gate_up, down))

    def renumber(self, origin: Sequence[int]) -> None:
        """Give the experts new numbers: ``origin[e]`` is the present number of e; -1: a new one of zeros."""
        self._stored = [self._stored[old] if old >= 0 else -1 for old in origin]
        if self._moved is not None:
            self._moved.renumber(self._layer, origin)

    def _run(self, expert: int, rows_ND: Tensor) -> Tensor:
        gate_up, down = (weight.to(rows_ND.device) for weight in self.read(expert))
        return gated_ffn(self._act_fn, rows_ND, gate_up, down)


def open_mapped(source: str, moved: MovedExperts | None = None) -> FedGraftForCausalLM:
    """Open a graph in fp32 and leave its experts on disk.

    Args:
        source: directory or hub id.
        moved: storage of experts with other weights than the checkpoint; None to open the graph read-only.

    Raises:
        UserError: no such checkpoint, not an expert graph, weights missing or of other shapes than the configuration's.
    """
    config = stored_config(source)
    check_is_graph(config, source)
    config.dtype = torch.float32
    files = GraphFiles(source)
    with torch.device("meta"), no_init_weights():
        model = FedGraftForCausalLM(config)
    _check_shapes(model, files, source)
    rest = {
        opened_name(name): files.tensor(name) for name in files.names() if not _EXPERT_WEIGHTS.fullmatch(name)
    }
    rest = {name: value.float() if value.is_floating_point() else value for name, value in rest.items()}
    model.load_state_dict(rest, strict=False, assign=True)
    for layer in model.expert_layers():
        layer.keep_in(MappedExperts(layer, files, moved))
    check_graph(model)
    # Rotary frequencies are computed, not stored.
    model.model.rotary_emb = type(model.model.rotary_emb)(config=config)
    model.tie_weights()
    model.generation_config = _generation_config(source, model)
    return model.eval()


@torch.no_grad()
def materialize(model: FedGraftForCausalLM, residents: Sequence[Tensor | None]) -> None:
    """Load ``residents`` (per layer bool ``[E]``, None for all) into fused fp32 tensors, and no other expert.

    Each expert is read once, directly into its row.
    """
    for layer, resident in zip(model.expert_layers(), residents, strict=True):
        held = held_experts(layer, resident)
        layer.resident, layer.residency_gate = resident, None
        if layer.storage is None and layer.held == held:
            continue
        gate_up = torch.empty(len(held), 2 * layer.expert_size, layer.hidden_size, device=model.device)
        down = torch.empty(len(held), layer.hidden_size, layer.expert_size, device=model.device)
        for row, expert in enumerate(held):
            for target, weight in zip((gate_up[row], down[row]), layer.read_expert(expert), strict=True):
                target.copy_(weight)
        layer.hold(held, gate_up, down)
        layer.storage = None


def _check_shapes(model: nn.Module, files: GraphFiles, source: str) -> None:
    tied = set(getattr(model, "all_tied_weights_keys", None) or {})
    stored = set(files.names())
    for opened, value in model.state_dict().items():
        name = stored_name(opened)
        if opened in tied and name not in stored:
            continue
        shape = files.shape(name) if name in stored else None
        if shape != list(value.shape):
            raise UserError(
                f"expected {name} of shape {list(value.shape)}, as config.json describes it, in {source}, "
                f"got {shape or 'none'}; the checkpoint is incomplete or its config.json belongs to another"
            )


def _generation_config(source: str, model: FedGraftForCausalLM) -> GenerationConfig:
    try:
        return GenerationConfig.from_pretrained(source)
    except OSError:
        return GenerationConfig.from_model_config(model.config)
