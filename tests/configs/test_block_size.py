"""Tokens per block."""

from __future__ import annotations

import pytest
from transformers import GPT2Config, LlamaConfig, MambaConfig, PreTrainedConfig

from configs.block_size import DEFAULT_BLOCK_SIZE, choose_block_size, context_length
from configs.errors import UserError


@pytest.mark.parametrize(
    ("asked", "context", "size"),
    [
        (None, 128, 128),
        (0, 128, 128),
        (None, 4096, 256),
        (None, None, 256),
        (128, 128, 128),
        (512, None, 512),
    ],
)
def test_blocks_are_as_long_as_asked_else_as_the_context_up_to_the_default(asked, context, size):
    assert DEFAULT_BLOCK_SIZE == 256
    assert choose_block_size(asked, context) == size


def test_blocks_beyond_the_context_are_refused():
    with pytest.raises(UserError, match="block-size to be at most .* max_position_embeddings 128, got 129"):
        choose_block_size(129, 128)


@pytest.mark.parametrize(
    ("config", "context"),
    [(LlamaConfig(max_position_embeddings=77), 77), (GPT2Config(n_positions=66), 66), (MambaConfig(), None)],
)
def test_context_of_a_configuration(config: PreTrainedConfig, context):
    assert context_length(config) == context
