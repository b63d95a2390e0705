"""Check of a node before it joins a federation: data, graph, memory, disk, and the cost of one round, measured."""

from __future__ import annotations

import resource
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import psutil
from flwr.app import Context, RecordDict

from clients.data_stream import node_blocks
from clients.participant import Participant
from clients.residents.budget import activation_bytes, client_budget, expert_bytes
from clients.state.local_graph import NeedsRecipe, local_graph, node_cache
from configs.errors import UserError
from configs.node_config import NodeConfig
from configs.output import check_free_space, check_output_directory
from configs.paths import graph_or_default
from configs.schema import RunConfig
from federated.protocol.messages import Request, message_bytes, write_reply
from federated.run_setup import prepare_process, with_block_size
from models.bootstrap.recipe import graph_fingerprint
from models.checkpoints.disk_experts import open_mapped
from models.files.config_file import read_config
from models.files.safetensors_files import weight_bytes
from models.graph.graph_state import read_graph
from models.runtime.precision import choose_device

_MIB = 2**20
_RUN_ID = 1  # of the round that is tried


@dataclass(frozen=True)
class Finding:
    """Result of one check.

    Attributes:
        name: of what was checked.
        ok: whether the node may join.
        detail: what was found, or what is wrong and how to fix it.
    """

    name: str
    ok: bool
    detail: str


@dataclass(frozen=True)
class RoundCost:
    """Cost of one round on this node, measured.

    Attributes:
        seconds: from the request to the reply, in this process; a SuperNode adds the start of a process.
        bytes_up: of the reply, as Flower serializes it.
        bytes_down: of the steps of the server for the next round, at most: the updates of all clients.
        memory_mb: peak resident memory of the process in MiB.
    """

    seconds: float
    bytes_up: int
    bytes_down: int
    memory_mb: float


@dataclass
class NodeCheck:
    """Checks of one node for one run configuration.

    Args:
        config: run configuration that the node is to expect.
        node: node configuration.
        fingerprint: of the server's graph; empty: not compared.
        recipe: of the server's graph, from which a node with ``base`` builds it; empty: none.

    Attributes:
        findings: results so far.
        cost: of one round; None if it was not tried or failed.
        fingerprint: of the node's graph, once it is known.
        graph: folder of the node's graph; empty until it is known to fit.
    """

    config: RunConfig
    node: NodeConfig
    fingerprint: str = ""
    recipe: bytes = b""
    findings: list[Finding] = field(default_factory=list)
    cost: RoundCost | None = None
    graph: str = ""

    @property
    def ok(self) -> bool:
        """Whether no check has failed."""
        return all(finding.ok for finding in self.findings)

    def run(self) -> Iterator[Finding]:
        """Check graph, data, disk and memory, then try a round if all of them fit; yields each result."""
        prepare_process(self.config)
        checks = (self._graph, self._data, self._disk, self._memory, self._round)
        for name, check in zip(("graph", "data", "disk", "memory", "round"), checks, strict=True):
            if name == "graph" or (self.graph and (name != "round" or self.ok)):
                yield self._attempt(name, check)

    def _attempt(self, name: str, check: Callable[[], str]) -> Finding:
        """Run a check and record its result."""
        try:
            finding = Finding(name, True, check())
        except NeedsRecipe:
            wanted = "fingerprint and recipe of the server's graph to build it from base, got none; ask the operator"
            finding = Finding(name, False, f"expected {wanted}")
        except (UserError, OSError, MemoryError, RuntimeError) as error:
            finding = Finding(name, False, " ".join(str(error).split()))
        self.findings.append(finding)
        return finding

    def _graph(self) -> str:
        node = self.node
        from_base = bool(node.base or self.config.base) and not node.graph
        if from_base and not (self.fingerprint and self.recipe):
            raise NeedsRecipe
        if not self.fingerprint:
            self.fingerprint = graph_fingerprint(graph_or_default(node.graph or self.config.graph))
        request = Request(1, 0, "", self.fingerprint, recipe=self.recipe)
        self.graph = local_graph(self.config, node, request)
        return f"{self.graph}, fingerprint {self.fingerprint}"

    def _data(self) -> str:
        config = with_block_size(self.config, read_config(self.graph))
        _, train, valid = node_blocks(config, self.node, self.graph)
        needed = config.local_steps * config.batch_size * config.accumulation_steps
        passes = f"; {needed / len(train):.1f} passes over them a round" if len(train) else ""
        return f"{len(train)} training and {len(valid)} held-out blocks of {config.block_size} tokens{passes}"

    def _disk(self) -> str:
        cache, size = node_cache(self.node), 2 * weight_bytes(self.graph)  # moved experts, and the residual
        check_output_directory(cache, overwrite=True)
        check_free_space({cache: size})
        return f"at most {size / _MIB:,.0f} MiB in {cache}"

    def _memory(self) -> str:
        model = open_mapped(self.graph)
        config = with_block_size(self.config, model.config)
        budget = client_budget(config, self.node, model, f"client-{self.node.partition_id}")
        experts = budget or max(model.config.num_experts)
        choose_device(self.node.device or self.config.device)
        held = psutil.Process().memory_info().rss
        needed = held + activation_bytes(config, model) + experts * expert_bytes(config, model)
        free = psutil.virtual_memory().available + held
        if needed > free:
            raise UserError(
                f"expected {needed / _MIB:,.0f} MiB of memory for {experts} experts a layer, got {free / _MIB:,.0f}; "
                "set memory-budget-mb or expert-budget, or lower batch-size"
            )
        return (
            f"at most {needed / _MIB:,.0f} MiB for {experts} experts a layer, {free / _MIB:,.0f} MiB are free"
        )

    def _round(self) -> str:
        request = Request(1, 0, read_graph(open_mapped(self.graph)).digest(), self.fingerprint)
        with tempfile.TemporaryDirectory(prefix="fedgraft-check-") as scratch:
            context = Context(
                run_id=_RUN_ID,
                node_id=1,
                node_config=self._trial_node(scratch),
                state=RecordDict(),
                run_config={},
            )
            started = time.monotonic()
            reply = Participant.open(self.config, context, request).train_round(request)
            size = message_bytes(write_reply(reply))
            seconds = time.monotonic() - started
        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024
        self.cost = RoundCost(seconds, size, size * self.config.num_clients, peak)
        return f"{seconds:.1f} s, {size:,} bytes up, at most {self.cost.bytes_down:,} down, {peak:,.0f} MiB at the peak"

    def _trial_node(self, scratch: str) -> dict[str, Any]:
        """Node configuration of a round that leaves nothing in the node's own cache."""
        values = {
            key.replace("_", "-"): value
            for key, value in self.node.model_dump(exclude_unset=True).items()
            if value is not None
        }
        values.pop("base", None)
        return values | {"graph": self.graph, "cache-dir": scratch}


def read_recipe_of(path: Path) -> bytes:
    """Read the recipe of a server's graph, from its file or its graph folder.

    Raises:
        UserError: there is none.
    """
    from models.bootstrap.recipe import RECIPE_NAME

    file = path / RECIPE_NAME if path.is_dir() else path
    with suppress(OSError):
        return file.read_bytes()
    raise UserError(
        f"expected the recipe of the server's graph, found none at {file}; ask the operator for {RECIPE_NAME}"
    )
