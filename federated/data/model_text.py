"""An opened model and text for it; what looks at experts while they work shares this."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Annotated, Any

import typer

if TYPE_CHECKING:
    from torch import Tensor
    from transformers import PreTrainedModel, PreTrainedTokenizerBase

ExpertModel = Annotated[
    str, typer.Option(help="Directory or hub id of an expert graph or a Hugging Face mixture of experts.")
]


@dataclass(frozen=True, eq=False)
class ModelText:
    """A model with experts, and how text is cut for it.

    Attributes:
        source: directory or hub id.
        model: opened.
        tokenizer: of the model.
        block_size: tokens of a block.
        batch_size: blocks that go through the model at once.
        max_blocks: of a domain; 0 for all.
    """

    source: str
    model: PreTrainedModel
    tokenizer: PreTrainedTokenizerBase
    block_size: int
    batch_size: int
    max_blocks: int

    def batches(self, data: Sequence[str], split: str) -> Iterator[tuple[Tensor, Tensor]]:
        """Batches ``(input_ids [B, S], counted [B, S])`` of data sources, one domain after the other.

        Raises:
            UserError: as ``texts_by_domain``, at once, and ``text_batches``.
        """
        from federated.data.text_batches import text_batches, texts_by_domain

        return text_batches(
            texts_by_domain(data, split).values(),
            self.tokenizer,
            block_size=self.block_size,
            batch_size=self.batch_size,
            max_blocks=self.max_blocks,
            max_position_embeddings=self.model.config.max_position_embeddings,
        )

    def provenance(self, data: Sequence[str], split: str) -> dict[str, Any]:
        """What figures of this model on this text carry with them. Reads the whole checkpoint, for its fingerprint."""
        from models.families.table import router_kind
        from models.files.fingerprint import checkpoint_fingerprint

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
    precision: str | None,
    device: str,
    block_size: int | None,
    batch_size: int,
    max_blocks: int,
) -> ModelText:
    """Open a model with experts; blocks are 256 tokens or the model's context where no size is given.

    Raises:
        UserError: as ``load_causal_lm``, and a model whose layers have no experts or store them in an unknown way.
    """
    from models.checkpoints.load import load_causal_lm, load_tokenizer
    from models.moe.views import moe_layers
    from models.runtime.precision import choose_device

    model = load_causal_lm(source, precision=precision, device=choose_device(device))
    moe_layers(model)
    size = block_size or min(256, model.config.max_position_embeddings)
    return ModelText(source, model, load_tokenizer(source), size, batch_size, max_blocks)
