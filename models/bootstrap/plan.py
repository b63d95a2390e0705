"""Options of the bootstrap of a dense model, and the plan of the experts of one layer."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from torch import Tensor

from configs.choices import Features, RouterFit, check_choice
from configs.errors import UserError
from experts.clustering import Clusters, check_clustering

# Share of the visits that go to shared experts, and rank of the default output over hidden width: of those tried on
# SmolLM2-135M the share had the lowest held-out perplexity at half of the experts; rank 128 in place of 64 lowered it.
_SHARED_VISITS, _RANK_OVER_WIDTH = 0.3, 2 / 9


@dataclass(frozen=True)
class BootstrapOptions:
    """Options of the bootstrap of a dense model.

    Attributes:
        num_experts: experts per layer; must divide the FFN width.
        features: features of a neuron for k-means, see ``configs.choices.Features``.
        clustering: balanced k-means, see ``configs.choices.Clustering``.
        router: fit of the routers, see ``configs.choices.RouterFit``. ``contribution`` calibrates layer by layer, each
            layer on what the compressed layers before it return, see ``models.bootstrap.layer_by_layer``.
        num_shared: shared experts per layer, which every token visits; with ``contribution`` only. As many as k
            select a fixed set of neurons.
        default_rank: rank of the default output of experts that are not visited; 0: none; with ``contribution`` only.
        experts_per_token: k; None for half of the experts.
        edges_per_expert: most edges that leave an expert.
        seed: seed of the k-means initialization.
        jobs: layers clustered in parallel; None for one per core if layers are large enough to gain from it.
    """

    num_experts: int
    features: str = "gate"
    clustering: str = "flow"
    router: str = "ridge"
    num_shared: int = 0
    default_rank: int = 0
    experts_per_token: int | None = None
    edges_per_expert: int = 4
    seed: int = 0
    jobs: int | None = None

    @classmethod
    def of_router(cls, num_experts: int, hidden_size: int, **given: Any) -> BootstrapOptions:
        """Options, where those that are None take the value that goes with the router.

        With ``contribution``, the router unless one is given: clusters of gate activations, 30 % of the visits to
        shared experts, and a default output of rank 2D/9, whose products are 6 % of those of an FFN of width 2.7 D.
        With other routers: clusters of gate rows, neither shared experts nor default output.

        Args:
            num_experts: experts per layer.
            hidden_size: D.
            given: further options by name; None to choose ``router``, ``features``, ``num_shared`` or ``default_rank``.
        """
        values = {name: value for name, value in given.items() if value is not None}
        router = values.setdefault("router", RouterFit.CONTRIBUTION)
        visits = values.get("experts_per_token", num_experts // 2)
        if router == RouterFit.CONTRIBUTION:
            values.setdefault("features", Features.GATE_ACTIVATION)
            values.setdefault("num_shared", max(0, round(_SHARED_VISITS * visits)))
            values.setdefault("default_rank", max(1, round(hidden_size * _RANK_OVER_WIDTH)))
        return cls(num_experts, **values)

    def __post_init__(self):
        check_choice("`features`", self.features, Features)
        check_clustering(self.clustering)
        check_choice("`router`", self.router, RouterFit)
        # Counts below one are refused by check_expert_count, which knows the FFN width and lists the valid ones.
        if self.num_experts >= 1 and not 1 <= self.visits <= self.num_experts:
            raise UserError(
                f"expected experts per token between 1 and the {self.num_experts} experts, got {self.visits}"
            )
        self._check_contribution()
        if self.edges_per_expert < 0:
            raise UserError(f"expected at least 0 edges per expert, got {self.edges_per_expert}")
        if self.jobs is not None and self.jobs < 1:
            raise UserError(f"expected jobs of at least 1, got {self.jobs}")

    def _check_contribution(self) -> None:
        if not 0 <= self.num_shared <= max(self.visits, 0):
            raise UserError(
                f"expected at most as many `shared experts` as the {self.visits} experts per token, got "
                f"{self.num_shared}"
            )
        if self.default_rank < 0:
            raise UserError(f"expected a `default rank` of at least 0, got {self.default_rank}")
        needed = self.num_shared or self.default_rank or self.features == Features.GATE_ACTIVATION
        if needed and self.router != RouterFit.CONTRIBUTION:
            raise UserError(
                "expected `router` to be contribution for shared experts, default outputs or the features "
                f"gate-activation, got {self.router}"
            )

    @property
    def visits(self) -> int:
        """Experts per token, k."""
        return self.experts_per_token if self.experts_per_token is not None else max(1, self.num_experts // 2)


@dataclass(frozen=True)
class LayerExperts:
    """Clusters, router and edges of the experts of one layer, without their weights.

    Attributes:
        clusters: neurons of each expert; experts in descending order of mean activation, shared ones first.
        router: ``[E, D]``, fp32.
        edges: bool ``[E, E]``.
        seconds: wall time of the clustering.
        num_shared: shared experts, the first of the layer.
        default: ``down [R, D]``, ``up [D, R]`` and ``bias [D]`` of the default output; None without one.
    """

    clusters: Clusters
    router: Tensor
    edges: np.ndarray
    seconds: float
    num_shared: int = 0
    default: tuple[Tensor, Tensor, Tensor] | None = None
