"""Observation of every expert's inputs and outputs in the forward passes of an opened model."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from functools import partial

from models.moe.layers import ExpertRows, MoELayer

OnRows = Callable[[MoELayer, ExpertRows], None]


@contextmanager
def observing_experts(layers: Sequence[MoELayer], on_rows: OnRows) -> Iterator[None]:
    """Context in which each forward pass calls ``on_rows(layer, rows)`` for every visited expert of ``layers``.

    Outputs of the model stay the same, to rounding. Experts run once; those that are modules run a second time.

    Raises:
        UserError: in the forward pass, where experts that are modules run on other numbers of tokens than the router
            kind says.
    """
    with ExitStack() as stack:
        for layer in layers:
            stack.enter_context(layer.observe(partial(on_rows, layer)))
        yield
