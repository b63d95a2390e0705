"""Choice of a client's residents in a round: those of its trained assembler or the most used experts."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from itertools import islice
from typing import NamedTuple

from torch import Tensor

from clients.residents.assembler import Assembler, most_used, train_assembler
from clients.residents.expert_features import expert_features
from clients.residents.trial_training import Residents, best_residents
from clients.training.trainer import Batch, LocalTraining
from configs.schema import RunConfig
from federated.data.blocks import Blocks, take
from models.graph.runtime_settings import residents, set_residents, visiting
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM

# Training blocks of the client from which features of experts are computed.
_FEATURE_BLOCKS = 16


class Assembly(NamedTuple):
    """Residents of a client, per layer bool ``[E]``.

    Attributes:
        chosen: residents for the round.
        most_used: experts that the client's tokens select most often, one of the candidates.
    """

    chosen: list[Tensor]
    most_used: list[Tensor]


def assemble(
    assembler: Assembler,
    model: FedGraftForCausalLM,
    train: Blocks,
    stream: Iterator[Batch],
    *,
    budget: int,
    visits: Sequence[int],
    config: RunConfig,
    training: LocalTraining,
    hold: Callable[[FedGraftForCausalLM, Residents], None] = set_residents,
) -> Assembly:
    """Train the assembler and choose its residents or the most used experts, whichever trains to the lower loss.

    Args:
        assembler: trained in place.
        model: global graph with all experts resident; on return it has the chosen residents.
        train: training blocks of the client, for the features of experts.
        stream: endless batches of them, consumed by the assembler and by trial training.
        budget: residents per layer.
        visits: experts per token, per layer.
        config: numbers of steps and learning rate of the assembler. With LoRA factors the assembler's residents are
            chosen without a trial, since factors of every candidate would have to be attached and removed.
        training: local training of the round.
        hold: see ``best_residents``.
    """
    known = take(train, _FEATURE_BLOCKS)
    features = expert_features(model, known.input_ids, known.labels, visits=visits)
    with visiting(model, visits):
        train_assembler(
            assembler,
            model,
            features,
            stream,
            budget=budget,
            steps=config.assembler_steps,
            learning_rate=config.assembler_learning_rate,
            autocast=training.autocast,
        )
        candidates = [residents(model), most_used(features, budget, model.config.num_shared)]
        tried = [] if config.lora_rank else list(islice(stream, config.lookahead_steps))
        chosen = candidates[best_residents(model, candidates, tried, training, hold=hold)]
    set_residents(model, chosen)
    return Assembly(chosen, candidates[1])
