"""Tie of the output head to the input embedding, decided by the stored weights and not by the configuration."""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import ExitStack
from itertools import zip_longest

from transformers import PreTrainedConfig, PreTrainedModel

from models.files.config_file import read_config
from models.files.safetensors_files import StoredTensor, bytes_between, checkpoint_files, stored_tensors

_HEAD, _EMBEDDING = "lm_head.weight", "model.embed_tokens.weight"


def stored_config(source: str) -> PreTrainedConfig:
    """Configuration of a checkpoint; ``tie_word_embeddings`` is false where its weights hold a head of other values.

    Args:
        source: directory or hub id.

    Raises:
        UserError: as ``read_config``; no weights there, or a damaged file.
    """
    config = read_config(source)
    if getattr(config, "tie_word_embeddings", False):
        tensors = [tensor for path in checkpoint_files(source) for tensor in stored_tensors(path)]
        config.tie_word_embeddings = not has_own_head({tensor.name: tensor for tensor in tensors})
    return config


def has_own_head(tensors: Mapping[str, StoredTensor]) -> bool:
    """Whether the stored tensors, by name, hold an output head of other values than the input embedding."""
    head, embedding = tensors.get(_HEAD), tensors.get(_EMBEDDING)
    if head is None or embedding is None:
        return False
    if (head.dtype, head.shape) != (embedding.dtype, embedding.shape):
        return True
    with ExitStack() as stack:
        parts = [
            bytes_between(stack.enter_context(tensor.path.open("rb")), tensor.start, tensor.stop)
            for tensor in (head, embedding)
        ]
        return any(one != other for one, other in zip_longest(*parts))


def record_own_head(model: PreTrainedModel) -> None:
    """Set ``tie_word_embeddings`` of a loaded model's configuration to false where its head is no longer tied."""
    head, embedding = model.get_output_embeddings(), model.get_input_embeddings()
    if head is None or embedding is None or head.weight is embedding.weight:
        return
    for config in (model.config, model.config.get_text_config(decoder=True)):
        if getattr(config, "tie_word_embeddings", False):
            config.tie_word_embeddings = False
