"""The client's copy of the global model on disk: the experts that differ from the checkpoint, and the rest."""

from __future__ import annotations

import json
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from clients.state.weight_files import Place, WeightFiles
from experts.graph.edit_plan import renumber_units
from experts.graph.expert_graph import ExpertGraph
from federated.protocol.copy_hash import copy_hash, unit_digest, vector_digest
from federated.updates.update import parse_unit, unit_name
from models.files.checked_file import read_checked, write_checked
from models.graph.attention_vectors import attention_count, read_attention, write_attention
from models.graph.graph_state import read_graph, write_graph
from models.graph.renumber import identity_origins, renumber_experts
from models.graph.unit_vectors import OTHERS, Unit, weight_count
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


class GlobalCopy:
    """Experts that ever moved, fp32, in ``WeightFiles``, and a state file with routing, graph and the places in those.

    The state file is replaced last and atomically, so that a killed process leaves the previous version. Experts are
    read on access (see ``models.checkpoints.disk_experts``), so that they need not fit into memory together.

    Args:
        folder: path, created on the first write.
    """

    def __init__(self, folder: Path) -> None:
        self._state = Path(folder) / "global.safetensors"
        self._weights = WeightFiles(Path(folder) / "experts")
        self._places: dict[Unit, Place] = {}
        self._digests: dict[Unit, str] = {}
        self._generation = 0

    def read(self, unit: Unit) -> Tensor | None:
        """Weights ``[3hd]`` fp32 of an expert; None if it never moved."""
        return self._weights.read(self._places[unit]) if unit in self._places else None

    def write(self, unit: Unit, weights: Tensor) -> None:
        """Write an expert's weights ``[3hd]``; they take effect with the next ``save``."""
        self._places[unit] = self._weights.append(self._generation + 1, weights)
        self._digests[unit] = vector_digest(weights)

    def renumber(self, layer: int, origin: Sequence[int]) -> None:
        """Give the experts of a layer new numbers: ``origin[e]`` is the present number of e; -1: a new one."""
        self._places = renumber_units(self._places, {layer: origin})
        self._digests = renumber_units(self._digests, {layer: origin})

    def hash(self, model: FedGraftForCausalLM, moved: Iterable[Unit] = ()) -> str:
        """Hash by which the server compares copies; only units that ``moved`` since the last call are hashed again.

        Args:
            model: graph opened over this copy.
            moved: units that moved since; of these, attention is hashed from ``model``.
        """
        attention = {unit for unit in moved if unit[1] == OTHERS}
        self._digests |= {unit: unit_digest(model, unit) for unit in attention}
        return copy_hash(model, self._digests)

    def load(self, model: FedGraftForCausalLM) -> int:
        """Load the version on disk into a ``model`` just opened over this copy; returns the version.

        Without intact files that fit the model, it stays at version 0.
        """
        self._clear()
        saved = read_checked(self._state)
        if saved is None:
            return 0
        try:
            graph, places, digests, version, generation = _parse(*saved)
            origins = identity_origins(read_graph(model), graph)
            self._check(model, saved[0], origins, places, digests)
        except (KeyError, ValueError, TypeError, AttributeError):
            return 0
        renumber_experts(model, origins)
        self._places, self._digests, self._generation = places, digests, generation
        self._weights.keep_only(places.values())
        for index in _write_rest(model, saved[0]):
            self._digests[index, OTHERS] = vector_digest(saved[0][f"attention/{index}"])
        write_graph(model, graph)
        return version

    def start_over(self) -> None:
        """Start from the checkpoint; the files on disk stay until the next ``save`` replaces them."""
        self._clear()
        saved = read_checked(self._state)
        with suppress(KeyError, ValueError, TypeError, AttributeError):
            self._generation = _parse(*saved)[-1] if saved is not None else 0

    def _clear(self) -> None:
        """Clear the record of the files on disk."""
        self._places, self._digests, self._generation = {}, {}, 0

    def save(self, model: FedGraftForCausalLM, version: int, moved: Iterable[Unit] = ()) -> None:
        """Save routing, graph and attention of ``model`` with the experts written before, as one version.

        Args:
            model: graph whose moved experts are written already.
            version: version of ``model``.
            moved: units that moved; of these, attention is saved here.
        """
        graph = read_graph(model)
        attention = {layer for layer, expert in (*moved, *self._digests) if expert == OTHERS}
        tensors = {
            f"{name}/{index}": parameter.detach().float()
            for index, layer in enumerate(model.expert_layers())
            for name, parameter in layer.routing_parameters().items()
        }
        tensors |= {
            f"mask/{index}": torch.from_numpy(mask.astype(np.uint8)) for index, mask in enumerate(graph.masks)
        }
        tensors |= {f"attention/{index}": read_attention(model, index) for index in attention}
        self._gather_scattered()
        self._weights.close_written()
        self._generation += 1
        facts = {
            "version": version,
            "graph_version": graph.version,
            "generation": self._generation,
            "attached": json.dumps(graph.attached_per_layer),
        }
        tensors |= {
            f"ids/{index}": torch.tensor(ids, dtype=torch.int64)
            for index, ids in enumerate(graph.ids_per_layer)
        }
        experts = {unit_name(unit): [*place, self._digests[unit]] for unit, place in self._places.items()}
        metadata = {key: str(value) for key, value in facts.items()} | {"experts": json.dumps(experts)}
        write_checked(self._state, tensors, metadata)
        self._weights.keep_only(self._places.values())

    def forget(self) -> None:
        """Delete the copy; the next load starts from the checkpoint."""
        self._state.unlink(missing_ok=True)
        self._clear()
        self._weights.close_written()
        self._weights.keep_only([])

    def _gather_scattered(self) -> None:
        """Append the experts of files that are mostly superseded to the new one, so that the folder stays bounded."""
        scattered = self._weights.scattered(self._places.values())
        for unit, place in self._places.items():
            if place.name in scattered:
                self._places[unit] = self._weights.append(self._generation + 1, self._weights.read(place))

    def _check(
        self,
        model: FedGraftForCausalLM,
        tensors: Mapping[str, Tensor],
        origins: Sequence[np.ndarray],
        places: Mapping[Unit, Place],
        digests: Mapping[Unit, str],
    ) -> None:
        """ValueError or KeyError for a copy of another model or a damaged expert."""
        layers = model.expert_layers()
        for index, (layer, origin) in enumerate(zip(layers, origins, strict=True)):
            if any(old < 0 and (index, new) not in places for new, old in enumerate(origin)):
                raise ValueError("a copy of another graph")
            for name, parameter in layer.routing_parameters().items():
                shape = [layer.hidden_size if name == "router" else len(origin)] * parameter.dim()
                shape[0] = len(origin)
                if list(tensors[f"{name}/{index}"].shape) != shape:
                    raise ValueError(f"{name} of layer {index} has another shape")
            attention = tensors.get(f"attention/{index}")
            if attention is not None and attention.numel() != attention_count(model, index):
                raise ValueError(f"attention of layer {index} has another size")
        for unit, place in places.items():
            fits = place.size == weight_count(layers[unit[0]])
            if not fits or vector_digest(self._weights.read(place)) != digests[unit]:
                raise ValueError(f"expert {unit} is damaged")


def _parse(
    tensors: Mapping[str, Tensor], metadata: Mapping[str, str]
) -> tuple[ExpertGraph, dict[Unit, Place], dict[Unit, str], int, int]:
    """Graph, places and digests of experts, version and generation; KeyError or ValueError for other contents."""
    count = sum(name.startswith("mask/") for name in tensors)
    masks = tuple(tensors[f"mask/{index}"].numpy().astype(np.bool_) for index in range(count))
    places, digests = {}, {}
    for key, (*place, digest) in json.loads(metadata["experts"]).items():
        unit = parse_unit(key)
        places[unit], digests[unit] = Place(*place), digest
    graph = ExpertGraph(
        masks,
        int(metadata["graph_version"]),
        attached=tuple(map(tuple, json.loads(metadata["attached"]))),
        ids=tuple(tuple(tensors[f"ids/{index}"].tolist()) for index in range(count)),
    )
    return graph, places, digests, int(metadata["version"]), int(metadata["generation"])


@torch.no_grad()
def _write_rest(model: FedGraftForCausalLM, tensors: Mapping[str, Tensor]) -> set[int]:
    """Set routing and attention of ``model``; returns the layers whose attention ever moved."""
    layers = model.expert_layers()
    for index, layer in enumerate(layers):
        for name, parameter in layer.routing_parameters().items():
            parameter.copy_(tensors[f"{name}/{index}"])
    moved = {index for index in range(len(layers)) if f"attention/{index}" in tensors}
    for index in moved:
        write_attention(model, index, tensors[f"attention/{index}"])
    return moved
