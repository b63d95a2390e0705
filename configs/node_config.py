"""Schema of a node's configuration: the keys that a Flower SuperNode takes in ``--node-config``.

Flower itself sets ``partition-id`` and ``num-partitions`` in a simulation; in a deployment each node names its own::

    flower-supernode ... --node-config 'partition-id=0 num-partitions=2 data-dir="/data/site0" memory-budget-mb=900'
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any

from pydantic import field_validator, model_validator

from configs.choices import Device
from configs.errors import UserError
from configs.keys import (
    Count,
    Density,
    Keys,
    NonNegative,
    Whole,
    check_known,
    integer_as_text,
    keys_of,
    one_of,
    validate_keys,
)


class NodeConfig(Keys):
    """Configuration of one node (client); immutable, conflicts are refused when it is built."""

    partition_id: Whole
    """Index of the client, from 0; below the run's num-clients unless data-dir is set."""
    num_partitions: Count | None = None
    """Nodes of the federation, set by Flower; not used, the run's num-clients applies."""
    graph: str = ""
    """Path of the node's copy of the graph checkpoint; takes precedence over base and over the run's graph."""
    base: str = ""
    """Dense model, path or hub id, from which the node builds the graph by the server's recipe; empty: the run's."""
    data_dir: str = ""
    """Private data, a path or hub id, all of it this client's; empty: its part of the run's data."""
    cache_dir: str = ""
    """Folder of the client's files, which outlast a run; empty: the run's log-dir, or the user-cache folder."""
    cache_days: Whole = 30
    """Days without use after which the files of other runs and built graphs are removed from that folder; 0: never."""
    cache_mb: Whole = 0
    """MiB of that folder above which those files are removed, too, the longest unused first; 0: no limit."""
    expert_budget: Whole | None = None
    """Experts per layer the client holds and trains, from 1; takes precedence over the run's budgets."""
    device: Annotated[str, one_of(Device)] | None = None
    """Device of the client's training, cpu, cuda or auto; takes precedence over the run's."""
    memory_budget_mb: Whole = 0
    """MiB that the client's process may occupy in training; takes precedence over the run's budgets; 0: the run's."""
    density: Density | None = None
    """Kept entries / all entries of the experts the client ships; takes precedence over the run's upload limits."""
    upload_budget_mb: NonNegative | None = None
    """MB (10^6 bytes) of the client's packed update, in place of density; 0: density applies."""

    @field_validator("graph", "base", "data_dir", "cache_dir", mode="before")
    @classmethod
    def _integer_as_text(cls, value: Any) -> Any:
        return integer_as_text(value)

    @model_validator(mode="after")
    def _refuse_conflicts(self) -> NodeConfig:
        if self.expert_budget is not None and self.memory_budget_mb:
            raise UserError("expected expert-budget or memory-budget-mb, got both; drop one of them")
        return self


def load_node_config(values: Mapping[str, Any]) -> NodeConfig:
    """Validate the hyphenated ``values`` of a node.

    Raises:
        UserError: an unknown key (the nearest is named), a missing partition-id, a wrong type, a value out of range, or
            two budgets; one line that ends with the client.
    """
    client = f"client {values['partition-id']}" if "partition-id" in values else "a client"
    known = keys_of(NodeConfig)
    check_known(values, known, kind="node-config key", listing=f"{client} may set {', '.join(known)}")
    try:
        return validate_keys(NodeConfig, values)
    except UserError as error:
        raise UserError(f"{error} in the node-config of {client}") from None
