"""Configuration of an expert graph: a Llama configuration plus the shape of its experts, layer by layer."""

from __future__ import annotations

from typing import Any

from transformers import LlamaConfig

WALKS = ("best-first", "depth-first")


class FedGraftConfig(LlamaConfig):
    """Llama whose every FFN is a graph of experts; opens in transformers 4.57 and 5.

    Args:
        num_experts: experts per layer, one integer a layer.
        expert_size: neurons per expert (h), the same in every layer.
        num_shared: shared experts per layer, one integer a layer: the first of the layer, visited by every token.
        default_rank: rank of the default output of experts that are not visited (see ``default_fedgraft``); 0: none.
        default_experts: experts per layer that the default outputs were fitted for, one integer a layer; None for
            ``num_experts``. Other counts remain where experts were removed since.
        attached_experts: attached experts per layer, ascending (see ``attached_fedgraft``); None for none.
        experts_per_token: experts that each token visits in a layer (k), shared ones among them, or all reachable
            ones if they are fewer.
        walk: ``best-first`` or ``depth-first``.
        graph_version: number of server merges that edited the graph since the bootstrap.
        base_fingerprint: SHA-256 of the weights of the dense base.
    """

    model_type = "fedgraft"

    num_experts: list[int] | None = None
    expert_size: int | None = None
    num_shared: list[int] | None = None
    default_rank: int = 0
    default_experts: list[int] | None = None
    attached_experts: list[list[int]] | None = None
    experts_per_token: int = 1
    walk: str = "best-first"
    graph_version: int = 0
    base_fingerprint: str = ""

    def __init__(
        self,
        num_experts: list[int] | None = None,
        expert_size: int | None = None,
        num_shared: list[int] | None = None,
        default_rank: int = 0,
        default_experts: list[int] | None = None,
        attached_experts: list[list[int]] | None = None,
        experts_per_token: int = 1,
        walk: str = "best-first",
        graph_version: int = 0,
        base_fingerprint: str = "",
        **kwargs: Any,
    ):
        super().__init__(**kwargs)
        self.num_experts = [1] * self.num_hidden_layers if num_experts is None else num_experts
        self.num_shared = [0] * self.num_hidden_layers if num_shared is None else num_shared
        self.default_rank, self.default_experts = default_rank, default_experts
        self.attached_experts = attached_experts
        self.experts_per_token, self.walk = experts_per_token, walk
        self.graph_version, self.base_fingerprint = graph_version, base_fingerprint
        self._check()
        self.expert_size = (
            self.intermediate_size // max(self.num_experts) if expert_size is None else expert_size
        )

    def _check(self) -> None:
        """Check expert counts, k and walk.

        Raises:
            ValueError: a layer without experts, not one count per layer, k out of range, unknown walk.
        """
        counts = self.num_experts
        if not isinstance(counts, list) or not all(
            isinstance(n, int) for n in [*counts, self.experts_per_token]
        ):
            raise ValueError(
                "num_experts must be a list of integers and experts_per_token an integer, "
                f"got {self.num_experts} and {self.experts_per_token}"
            )
        if len(self.num_experts) != self.num_hidden_layers or min(self.num_experts) < 1:
            raise ValueError(
                f"num_experts must name at least one expert for each of the {self.num_hidden_layers} layers, "
                f"got {self.num_experts}"
            )
        if len(self.num_shared) != self.num_hidden_layers or not all(
            0 <= shared <= count for shared, count in zip(self.num_shared, self.num_experts, strict=True)
        ):
            raise ValueError(
                f"num_shared must name for each layer at most its experts {self.num_experts}, got {self.num_shared}"
            )
        self._check_attached()
        chosen = [
            count - len(attached) for count, attached in zip(counts, self.attached_per_layer, strict=True)
        ]
        fitted = counts if self.default_experts is None else self.default_experts
        if len(fitted) != len(counts) or any(n < count for n, count in zip(fitted, chosen, strict=True)):
            raise ValueError(
                f"default_experts must name at least the experts that are not attached, {chosen}, for each layer, "
                f"got {fitted}"
            )
        if not 1 <= self.experts_per_token <= max(self.num_experts):
            raise ValueError(
                f"experts_per_token must lie between 1 and {max(self.num_experts)}, got {self.experts_per_token}"
            )
        if self.walk not in WALKS:
            raise ValueError(f"walk must be one of {WALKS}, got {self.walk!r}")

    @property
    def attached_per_layer(self) -> list[list[int]]:
        """Attached experts per layer."""
        return [[] for _ in self.num_experts] if self.attached_experts is None else self.attached_experts

    def _check_attached(self) -> None:
        lists = self.attached_per_layer
        if len(lists) != len(self.num_experts) or not all(
            list(attached) == sorted(set(attached)) and all(0 <= expert < count for expert in attached)
            for attached, count in zip(lists, self.num_experts, strict=True)
        ):
            raise ValueError(
                f"attached_experts must name experts of {self.num_experts} for each layer, ascending, got {lists}"
            )


__all__ = ["FedGraftConfig"]
