"""Set-up that the client app and the server app have in common: the process and the routing of the model."""

from __future__ import annotations

from typing import Any

import torch
from transformers.utils.logging import disable_progress_bar

from configs.block_size import choose_block_size, context_length
from configs.schema import RunConfig
from federated.driver_watch import end_with_driver
from models.graph.runtime_settings import set_visits, set_walk
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM


def prepare_process(config: RunConfig) -> None:
    """Set torch's threads and seed from the run configuration; switch off progress bars, which would fill the log.

    The process ends with the command that drives the run, where there is one (``federated.driver_watch``).
    """
    end_with_driver()
    disable_progress_bar()
    torch.set_num_threads(config.num_threads)
    torch.manual_seed(config.seed)


def with_block_size(config: RunConfig, model: Any) -> RunConfig:
    """The run configuration with the tokens per block for a model of configuration ``model`` (``choose_block_size``).

    Raises:
        UserError: ``block-size`` above the model's context.
    """
    size = choose_block_size(config.block_size, context_length(model))
    return config.model_copy(update={"block_size": size})


def override_routing(model: FedGraftForCausalLM, config: RunConfig) -> None:
    """Set experts per token and walk of ``model`` where the run configuration names them.

    Raises:
        UserError: more experts per token than any layer has.
    """
    if config.experts_per_token:
        set_visits(model, config.experts_per_token)
    if config.walk:
        set_walk(model, config.walk)
