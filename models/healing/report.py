"""Held-out perplexity of a graph and its dense base, and the difference of their logits with all experts active."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from models.bootstrap.equality_check import check_equality, first_logits
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.runtime.perplexity import evaluate_loss

_STATES = ("before", "after")


@dataclass
class HeldOutReport:
    """Measurements of a healing on held-out text.

    Attributes:
        dense: teacher.
        input_ids: held-out text, ``[N, S]``.
        labels: ``[N, S]``; -100 at padding.
        on_step: called with the measurements done and their total.
        perplexity: perplexity of ``dense``, and of the graph ``before`` and ``after`` healing.
        logit_difference: ``before`` and ``after`` healing, see ``check_equality``.
        seconds: wall time of the measurements.
    """

    dense: PreTrainedModel
    input_ids: Tensor
    labels: Tensor
    on_step: Callable[[int, int], None] = lambda done, total: None
    perplexity: dict[str, float] = field(default_factory=dict)
    logit_difference: dict[str, float] = field(default_factory=dict)
    seconds: float = 0.0

    def measure(self, graph: FedGraftForCausalLM, state: str) -> None:
        """Measure ``graph`` as ``before`` or ``after``, and the dense model unless it is measured."""
        start = time.monotonic()
        if "dense" not in self.perplexity:
            self._measure_perplexity("dense", self.dense)
        self._measure_perplexity(state, graph)
        expected = first_logits(self.dense, self.input_ids)
        self.logit_difference[state] = check_equality(expected, graph, self.input_ids, exact=False)
        self.seconds += time.monotonic() - start

    def figures(self) -> dict[str, Any]:
        """``{"perplexity", "logit_difference", "evaluation_tokens", "evaluation_seconds"}``."""
        return {
            "perplexity": self.perplexity,
            "logit_difference": self.logit_difference,
            "evaluation_tokens": self.input_ids.numel(),
            "evaluation_seconds": self.seconds,
        }

    def _measure_perplexity(self, name: str, model: PreTrainedModel) -> None:
        self.perplexity[name] = evaluate_loss(model, self.input_ids, self.labels).perplexity
        self.on_step(len(self.perplexity), 1 + len(_STATES))
