"""A model with experts together with the blocking of text for it, as measurements on experts need them."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

# Torch and transformers take seconds to import, so that functions import what needs them.
if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

    from federated.data.answers import Document


@dataclass(frozen=True, eq=False)
class ModelText:
    """A model with experts and the block and batch sizes of text for it.

    Attributes:
        source: directory or hub id of the checkpoint.
        model: opened model.
        tokenizer: tokenizer of the model.
        block_size: tokens per block.
        batch_size: blocks per forward pass.
        max_blocks: blocks per domain; 0: all.
    """

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    block_size: int
    batch_size: int
    max_blocks: int

    def batches(self, data: Sequence[str], split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``(input_ids [B, S], token_mask [B, S] bool)`` of data sources, one domain after the other.

        Raises:
            UserError: as ``texts_by_domain`` and for a token id beyond the embedding, at once; as ``text_batches``, at
                the first batch.
        """
        from federated.data.chat_template import ChatTemplate
        from federated.data.text_batches import texts_by_domain
        from models.runtime.token_ids import may_exceed

        chat = ChatTemplate(lambda: self.tokenizer)
        domains = list(texts_by_domain(data, split, chat=chat).values())
        if may_exceed(self.tokenizer, self.vocab_size):
            for _ in self._batches(domains):  # a measurement may take long before it reaches the token
                pass
        return self._batches(domains)

    @property
    def vocab_size(self) -> int:
        """Rows of the model's embedding."""
        from models.runtime.token_ids import embedding_rows

        return embedding_rows(self.model)

    def _batches(self, domains: Sequence[Sequence[Document]]) -> Iterator[tuple[Tensor, Tensor]]:
        from federated.data.text_batches import text_batches

        return text_batches(
            domains,
            self.tokenizer,
            block_size=self.block_size,
            batch_size=self.batch_size,
            max_blocks=self.max_blocks,
            vocab_size=self.vocab_size,
        )

    def provenance(self, data: Sequence[str], split: str) -> dict[str, Any]:
        """Model, fingerprint, router kind and text of a measurement; reads the whole checkpoint."""
        from models.files.fingerprint import checkpoint_fingerprint
        from models.moe.views import router_kind

        return {
            "model": self.source,
            "model_fingerprint": checkpoint_fingerprint(self.source),
            "router": str(router_kind(self.model.config)),
            "datasets": list(data),
            "split": split,
            "block_size": self.block_size,
            "batch_size": self.batch_size,
            "max_blocks": self.max_blocks,
        }


def open_model_text(
    source: str,
    *,
    precision: str,
    device: str,
    block_size: int | None,
    batch_size: int,
    max_blocks: int,
) -> ModelText:
    """Open a model with experts for measurements on text.

    Args:
        source: directory or hub id.
        precision: of the weights, as ``load_causal_lm`` takes it.
        device: ``auto``, ``cpu`` or ``cuda``.
        block_size: tokens per block, as ``choose_block_size`` takes them.
        batch_size: blocks per forward pass.
        max_blocks: blocks per domain; 0: all.

    Raises:
        UserError: as ``load_causal_lm``; a checkpoint that cannot be pruned (see ``read_moe_layout``); blocks beyond
            the model's context.
    """
    from configs.block_size import choose_block_size, context_length
    from models.checkpoints.load import load_causal_lm, load_tokenizer
    from models.files.config_file import read_config
    from models.files.side_files import local_checkpoint
    from models.moe.views import moe_layers
    from models.moe_files.layout import read_moe_layout
    from models.runtime.precision import choose_device

    size = choose_block_size(block_size, context_length(read_config(source)))
    read_moe_layout(local_checkpoint(source))  # refused before a measurement that could not be used
    model = load_causal_lm(source, precision=precision, device=choose_device(device))
    moe_layers(model)
    return ModelText(source, model, load_tokenizer(source), size, batch_size, max_blocks)
