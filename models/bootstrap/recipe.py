"""Recipe of an expert graph: neuron permutation, routers and masks, without any weight of the dense base.

A client that holds the base rebuilds the graph bit for bit (see ``recipe_build``) from two bytes per neuron and four
per router weight, in place of a download of the whole graph.
"""

from __future__ import annotations

import hashlib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

import numpy as np
import safetensors
from pydantic import BaseModel, ConfigDict, Field, ValidationError
from safetensors.numpy import save
from transformers import PreTrainedConfig
from transformers.utils.hub import cached_file

from configs.errors import UserError
from experts.graph.expert_graph import check_mask, check_reachable
from models.files.config_file import check_is_graph, read_config
from models.files.fingerprint import checkpoint_fingerprint, remembered_fingerprint
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

RECIPE_NAME = "recipe.safetensors"
_DTYPES = {"U8": np.uint8, "U16": np.uint16, "U32": np.uint32, "F32": np.float32, "BOOL": np.uint8}
_INDICES = ("U16", "U32")
# Arrays of the default outputs, by the parameter of ``DefaultOutput`` that they hold for every layer.
_DEFAULTS = {"down": "default_down", "up": "default_up", "bias": "default_bias"}
_BASE_FACTS = (
    "hidden_act",
    "num_attention_heads",
    "num_key_value_heads",
    "head_dim",
    "rms_norm_eps",
    "tie_word_embeddings",
    "attention_bias",
)


class RecipeFacts(BaseModel):
    """Scalar facts of a recipe.

    Attributes:
        format: format version.
        base_fingerprint: SHA-256 of the base's parameters, see ``models.files.fingerprint.fingerprint``.
        dtype: dtype of the graph's weights.
        experts_per_token: k.
        walk: ``best-first`` or ``depth-first``.
        num_shared: shared experts per layer.
        default_rank: rank of the default outputs; 0: none.
        base_config: configuration values of the base that its weights do not show, see ``base_facts``.
    """

    model_config = ConfigDict(frozen=True, strict=True, extra="forbid")

    format: Literal[1] = 1
    base_fingerprint: str = Field(pattern="^[0-9a-f]{64}$")
    dtype: Literal["float32", "bfloat16", "float16"]
    experts_per_token: int = Field(ge=1)
    walk: Literal["best-first", "depth-first"]
    num_shared: int = Field(default=0, ge=0)
    default_rank: int = Field(default=0, ge=0)
    base_config: dict[str, bool | int | float | str | None]


@dataclass(frozen=True)
class Recipe:
    """Neurons, routers and masks of L layers of E experts with H neurons each.

    Attributes:
        facts: scalar facts.
        neurons: ``[L, E, H]`` uint16 or uint32, the base's neurons in the experts' order.
        routers: ``[L, E, D]`` fp32.
        masks: ``[L, E, E]`` bool.
        defaults: ``down [L, R, D]``, ``up [L, D, R]`` and ``bias [L, D]`` of the default outputs, fp32, or empty.
    """

    facts: RecipeFacts
    neurons: np.ndarray
    routers: np.ndarray
    masks: np.ndarray
    defaults: dict[str, np.ndarray] = field(default_factory=dict)


def recipe_of(graph: FedGraftForCausalLM) -> Recipe:
    """Recipe of a freshly bootstrapped graph, which has the dtype that it is stored with."""
    layers, config = graph.expert_layers(), graph.config
    neurons = np.stack([layer.neurons.cpu().numpy() for layer in layers])
    facts = RecipeFacts(
        base_fingerprint=config.base_fingerprint,
        dtype=str(graph.dtype).removeprefix("torch."),
        experts_per_token=config.experts_per_token,
        walk=config.walk,
        num_shared=config.num_shared[0],
        default_rank=config.default_rank,
        base_config=base_facts(config),
    )
    return Recipe(
        facts,
        neurons.astype(np.uint16 if neurons.max() < 1 << 16 else np.uint32),
        np.stack([layer.router.weight.detach().float().cpu().numpy() for layer in layers]),
        np.stack([layer.edges.cpu().numpy() for layer in layers]),
        {
            name: np.stack([getattr(layer.default, name).detach().float().cpu().numpy() for layer in layers])
            for name in (_DEFAULTS if config.default_rank else ())
        },
    )


def graph_fingerprint(source: str, memory: Path | None = None) -> str:
    """SHA-256 over all tensors of a graph checkpoint, its k, walk and graph version.

    Args:
        source: directory or hub id.
        memory: see ``models.files.fingerprint.remembered_fingerprint``; None to read all weights.

    Raises:
        UserError: no such graph, or a damaged file.
    """
    config = read_config(source)
    check_is_graph(config, source)
    weights = remembered_fingerprint(source, memory) if memory else checkpoint_fingerprint(source)
    facts = [weights, config.experts_per_token, config.walk, config.graph_version]
    facts += [each for each in (config.num_shared, config.default_experts) if any(each or ())]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def base_facts(config: PreTrainedConfig) -> dict[str, bool | int | float | str | None]:
    """Configuration values that determine the outputs of a Llama, other than weights and their shapes."""
    rope = config.rope_parameters or {}
    facts = {name: getattr(config, name) for name in _BASE_FACTS}
    return facts | {name: rope.get(name) for name in ("rope_theta", "rope_type", "factor")}


def write_recipe(recipe: Recipe) -> bytes:
    """Serialize a recipe as safetensors, deterministically."""
    facts = np.frombuffer(recipe.facts.model_dump_json().encode(), dtype=np.uint8)
    arrays = {"neurons": recipe.neurons, "routers": recipe.routers, "masks": recipe.masks}
    arrays |= {_DEFAULTS[name]: values for name, values in recipe.defaults.items()}
    return save({"facts": facts, **{name: np.ascontiguousarray(array) for name, array in arrays.items()}})


def read_recipe(data: bytes) -> Recipe:
    """Parse and validate the bytes of a recipe, the inverse of ``write_recipe``.

    Raises:
        UserError: other bytes, neurons that are not a permutation, routers that are not finite, invalid masks.
    """
    views = _views(data)
    facts = _read_facts(bytes(views["facts"]["data"]))
    neurons, routers = _array(views, "neurons", _INDICES, 3), _array(views, "routers", ("F32",), 3)
    bits = _array(views, "masks", ("BOOL",), 3)
    layers, experts, size = neurons.shape
    if not neurons.size or routers.shape[:2] != (layers, experts) or bits.shape != (layers, experts, experts):
        raise _defect(
            "as many experts in neurons, routers and masks",
            f"shapes {neurons.shape}, {routers.shape} and {bits.shape}",
        )
    if facts.experts_per_token > experts:
        raise _defect(f"at most {experts} experts per token", f"{facts.experts_per_token}")
    if facts.num_shared > facts.experts_per_token:
        raise _defect(f"at most {facts.experts_per_token} shared experts", f"{facts.num_shared}")
    defaults = _defaults(views, facts.default_rank, routers.shape)
    recipe = Recipe(facts, neurons, routers, bits.astype(bool), defaults)
    _check_values(recipe, bits)
    return recipe


def read_recipe_file(source: str) -> bytes:
    """Bytes of the recipe file of a graph checkpoint; empty if it has none.

    Args:
        source: directory or hub id.
    """
    try:
        path = cached_file(source, RECIPE_NAME)
    except OSError:
        return b""
    with open(path, "rb") as file:
        return file.read()


def check_fits(recipe: Recipe, config: PreTrainedConfig, source: str) -> None:
    """Refuse a recipe whose base differs in shape or configuration from ``config``, read from ``source``.

    Raises:
        UserError: names the first value that differs.
    """
    layers, experts, size = recipe.neurons.shape
    shapes = {
        "num_hidden_layers": layers,
        "intermediate_size": experts * size,
        "hidden_size": recipe.routers.shape[2],
    }
    found = {name: getattr(config, name) for name in shapes} | base_facts(config)
    for name, value in {**shapes, **recipe.facts.base_config}.items():
        if name not in found or found[name] != value:
            raise UserError(
                f"expected a base with {name} = {value}, as the server's graph was made from, "
                f"got {found.get(name)} in {source}; name that checkpoint in base"
            )


def _views(data: bytes) -> dict[str, dict]:
    try:
        views = dict(safetensors.deserialize(data))
    except (safetensors.SafetensorError, ValueError, TypeError) as error:
        raise _defect("safetensors", f"other bytes ({error})") from error
    expected = {"facts", "neurons", "routers", "masks"}
    if set(views) not in (expected, expected | set(_DEFAULTS.values())):
        raise _defect(f"the tensors {', '.join(sorted(expected))}", ", ".join(sorted(views)) or "none")
    return views


def _read_facts(data: bytes) -> RecipeFacts:
    try:
        return RecipeFacts.model_validate_json(data)
    except ValidationError as error:
        first = error.errors()[0]
        place = ".".join(map(str, first["loc"])) or "facts"
        raise _defect(f"facts that can be read ({place}: {first['msg']})", "others") from error


def _array(views: dict[str, dict], name: str, dtypes: tuple[str, ...], ndim: int) -> np.ndarray:
    view = views[name]
    if view["dtype"] not in dtypes or len(view["shape"]) != ndim:
        raise _defect(
            f"{name} of {' or '.join(dtypes)} in {ndim} dimensions", f"{view['dtype']} {view['shape']}"
        )
    return np.frombuffer(view["data"], dtype=_DTYPES[view["dtype"]]).reshape(view["shape"])


def _defaults(views: dict[str, dict], rank: int, shape: tuple[int, ...]) -> dict[str, np.ndarray]:
    """Arrays of the default outputs of layers with routers of ``shape [L, E, D]``; none for rank 0."""
    layers, _, width = shape
    shapes = {"down": (layers, rank, width), "up": (layers, width, rank), "bias": (layers, width)}
    found = {name: key for name, key in _DEFAULTS.items() if key in views}
    if len(found) != (len(_DEFAULTS) if rank else 0):
        raise _defect(f"default outputs of rank {rank}", ", ".join(found.values()) or "none")
    arrays = {name: _array(views, key, ("F32",), len(shapes[name])) for name, key in found.items()}
    for name, values in arrays.items():
        if values.shape != shapes[name] or not np.isfinite(values).all():
            raise _defect(f"finite {_DEFAULTS[name]} of shape {shapes[name]}", f"shape {values.shape}")
    return arrays


def _check_values(recipe: Recipe, bits: np.ndarray) -> None:
    layers, experts, size = recipe.neurons.shape
    order = np.sort(recipe.neurons.reshape(layers, -1), axis=1)
    broken = np.flatnonzero((order != np.arange(experts * size)).any(axis=1))
    if len(broken):
        raise _defect(f"each of the {experts * size} neurons once in layer {broken[0]}", "others")
    if not np.isfinite(recipe.routers).all():
        raise _defect("finite routers", "NaN or Inf")
    if bits.max() > 1:
        raise _defect("masks of 0 and 1", str(bits.max()))
    for layer, mask in enumerate(recipe.masks):
        check_mask(mask, layer)
        check_reachable(mask, layer)


def _defect(expected: str, got: str) -> UserError:
    return UserError(
        f"expected a recipe with {expected}, got {got}; run `fedgraft bootstrap` on the server again"
    )
