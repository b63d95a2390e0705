"""Expert budget of a client: configured experts per layer, or as many as its memory holds."""

from __future__ import annotations

import psutil

from configs.errors import UserError
from configs.node_config import NodeConfig
from configs.schema import RunConfig
from models.graph.runtime_settings import fewest_residents
from models.graph.unit_vectors import weight_count
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

_MIB = 2**20
# Bytes per weight of a resident expert whose matrix trains: fp32 weight, gradient and optimizer state.
_TRAINED = {"adamw": 16.0, "sgd": 12.0, "adafactor": 9.0}
# Bytes per weight of a fixed base under LoRA factors; 4-bit blocks have scales.
_FIXED = {"fp32": 4.0, "bf16": 2.0, "nf4": 0.6}
# Bytes while an update is packed, per weight and per kept entry: one expert at a time is dense, and kept entries pass
# through the quantizer. With a byte budget, per byte of it: several sizes are tried.
_PACKED, _PACKED_ENTRY, _PACKED_BYTE = 2.5, 40.0, 160.0
# Bytes per weight of the second moments that score the entries, and of the changes where they are kept in memory.
_MOMENTS, _CHANGES = 4.0, 4.0


def client_budget(config: RunConfig, node: NodeConfig, model: FedGraftForCausalLM, name: str) -> int:
    """Experts per layer that a client holds; 0 for all.

    The node's ``expert-budget`` or ``memory-budget-mb`` takes precedence over the run's.

    Args:
        config: run configuration.
        node: node configuration.
        model: graph with its experts on disk.
        name: client name, for messages.

    Raises:
        UserError: a budget below 1, below the graph's shared experts or above its experts per layer, or memory for
            fewer experts.
    """
    if node.expert_budget is not None:
        return _checked(node.expert_budget, model, name)
    if memory := node.memory_budget_mb or config.memory_budget_mb:
        return budget_of_memory(config, model, memory, name)
    budget = config.client_budgets[node.partition_id % config.num_clients]
    return _checked(budget, model, name) if budget else 0


def budget_of_memory(config: RunConfig, model: FedGraftForCausalLM, memory_mb: int, name: str) -> int:
    """Largest number of experts per layer whose training keeps this process within ``memory_mb`` MiB.

    Raises:
        UserError: one expert, or all shared ones, do not fit.
    """
    left = memory_mb * _MIB - psutil.Process().memory_info().rss - activation_bytes(config, model)
    left -= _PACKED_BYTE * config.upload_budget_mb * 10**6
    each = expert_bytes(config, model)
    budget, least = min(int(left // each), max(model.config.num_experts)), fewest_residents(model.config)
    if budget < least:
        needed = memory_mb + -(-(least * each - left) // _MIB)
        count = "one expert" if least == 1 else f"the {least} shared experts"
        raise UserError(
            f"expected memory-budget-mb of at least {needed:.0f} for {count} a layer of client {name}, "
            f"got {memory_mb}; raise it, or lower batch-size or block-size"
        )
    return budget


def expert_bytes(config: RunConfig, model: FedGraftForCausalLM) -> float:
    """Peak bytes of a round per resident expert in every layer."""
    weights = sum(weight_count(layer) for layer in model.expert_layers())
    held = _FIXED[config.weights] if config.lora_rank else 4.0
    training = held if config.lora_rank else _TRAINED[config.optimizer]
    packed = _PACKED if config.upload_budget_mb else _PACKED + _PACKED_ENTRY * config.density
    if config.entry_score == "saliency" and config.optimizer == "adamw" and not config.lora_rank:
        packed += _MOMENTS
    if keeps_changes(config):
        packed += _CHANGES
    return weights * max(training, held + packed)


def keeps_changes(config: RunConfig) -> bool:
    """Whether packing keeps all changes in memory: where gradients and optimizer state, freed by then, took more."""
    return config.optimizer != "adafactor" and not config.lora_rank


def activation_bytes(config: RunConfig, model: FedGraftForCausalLM) -> float:
    """Upper estimate of the bytes of activations of a training step, without gradient checkpointing."""
    shape, tokens = model.config, config.batch_size * config.block_size
    visits = max(layer.num_visits for layer in model.expert_layers())
    experts = visits * (3 * shape.hidden_size + 4 * shape.expert_size)
    logits = 3 * shape.vocab_size
    return 4.0 * tokens * (shape.num_hidden_layers * (12 * shape.hidden_size + experts) + logits)


def _checked(budget: int, model: FedGraftForCausalLM, name: str) -> int:
    least, most = fewest_residents(model.config), max(model.config.num_experts)
    if not least <= budget <= most:
        shared = "" if least == 1 else ", of which every token visits the shared ones,"
        raise UserError(
            f"expected a budget from {least} to the graph's {most} experts{shared} for client {name}, got {budget}"
        )
    return budget
