"""Expert visits of single tokens: the entries of ``expert_call_trace.json``."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from models.graph.runtime_settings import Observer, observing_walks
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


@torch.no_grad()
def call_trace(model: FedGraftForCausalLM, input_ids: Tensor, max_tokens: int) -> list[dict[str, Any]]:
    """Record the routing of the first ``max_tokens`` tokens of ``input_ids [N, S]``, one entry per token and layer.

    ``experts`` are in order of visit, ``parents`` the expert whose edge led there (-1: the router), ``weights`` the
    output weights; ``token`` is the position in the sequence.
    """
    length = input_ids.shape[1]
    wanted = input_ids[: -(-max_tokens // length)] if max_tokens else input_ids[:0]
    entries: list[dict[str, Any]] = []

    def observer(index: int) -> Observer:
        def observe(layer, scores_TE, walk, weights_TK) -> None:
            rows = zip(walk.experts_TK.tolist(), walk.parents_TK.tolist(), weights_TK.tolist(), strict=True)
            for position, (experts, parents, weights) in list(enumerate(rows))[:max_tokens]:
                made = sum(expert >= 0 for expert in experts)
                entries.append(
                    {
                        "sequence": position // length,
                        "layer": index,
                        "token": position % length,
                        "experts": experts[:made],
                        "parents": parents[:made],
                        "weights": [round(weight, 6) for weight in weights[:made]],
                    }
                )

        return observe

    if len(wanted):
        with observing_walks(model, observer):
            model(input_ids=wanted, use_cache=False)
    return sorted(entries, key=lambda entry: (entry["sequence"], entry["token"], entry["layer"]))
