"""One client of a federation: training and evaluation rounds, in domain steps."""

from __future__ import annotations

import time
from collections.abc import Iterator, Mapping
from dataclasses import dataclass

import torch
from flwr.app import Context
from torch import Tensor

from clients.data_stream import BATCH_ORDER, UPLOAD_SELECTION, node_blocks, round_generator
from clients.residents.assembly import assemble
from clients.residents.budget import client_budget, keeps_changes
from clients.shipment import carried_over, choose_shipment, drawn_with, shipped_in, with_own_limits
from clients.state.cache_pruning import prune_cache
from clients.state.local_copy import bring_to_version, client_folder
from clients.state.local_graph import local_graph
from clients.state.store import ClientStore
from clients.training.gradient_rms import entry_gradient_rms
from clients.training.resident_model import changes, hold_residents
from clients.training.starting_point import StartingPoint
from clients.training.trainer import Batch, LocalResult, LocalTraining, train_locally
from configs.node_config import load_node_config
from configs.schema import RunConfig
from federated.aggregation.usage import UsageCounter, pack_usage
from federated.data.blocks import Blocks, batches, take
from federated.protocol.messages import Reply, Request
from federated.run_setup import override_routing, with_block_size
from federated.selection.entries import Score, gradient_score
from federated.selection.shared_entries import SharedEntries
from federated.updates.update import density
from federated.wire.codec import pack_update
from models.checkpoints.disk_experts import materialize, open_mapped
from models.graph.graph_state import read_graph
from models.graph.runtime_settings import (
    residents,
    scaled_visits,
    visiting,
    warn_where_fewer_reside,
)
from models.graph.unit_vectors import Unit, trained_spans, unit_sizes
from models.remote_code.modeling_fedgraft import FedGraftForCausalLM
from models.runtime.perplexity import LossSum, evaluate_loss
from models.runtime.precision import autocast_to_bf16, choose_device


@dataclass
class Participant:
    """State of one client for one message.

    Attributes:
        config: run configuration, with the node's own limits.
        partition: index of the client, from 0.
        budget: experts per layer that it can hold; 0: all.
        name: client name, for display.
        store: files of the client.
        model: global graph, fp32.
        train: training blocks.
        valid: held-out blocks.
        started: time (``time.time``) at which the work for the message began.
    """

    config: RunConfig
    partition: int
    budget: int
    name: str
    store: ClientStore
    model: FedGraftForCausalLM
    train: Blocks
    valid: Blocks
    started: float

    @classmethod
    def open(
        cls, config: RunConfig, context: Context, request: Request, *, started: float | None = None
    ) -> Participant:
        """Load the client's data and its copy of the global model, updated to the request's version.

        Args:
            config: run configuration.
            context: Flower's context of the node.
            request: request of the message.
            started: time at which the work for the message began; None: now.

        Raises:
            UserError: an invalid node configuration, no such graph, another base than the server's, no data, a budget
                above the graph's experts.
            NeedsRecipe: the graph is not built from the dense base yet.
            VersionMismatch: the request's steps do not start at the version on disk.
            RefusedUpdate: a damaged step, or one that leads to another graph than the server's.
        """
        started = time.time() if started is None else started
        node = load_node_config(context.node_config)
        partition = node.partition_id
        graph = local_graph(config, node, request)
        prune_cache(config, node, run_id=request.run_id or context.run_id)
        folder = client_folder(config, node, run_id=request.run_id or context.run_id)
        store = ClientStore(folder / f"client-{partition}")
        model = open_mapped(graph, store.copy).to(choose_device(node.device or config.device))
        config = with_block_size(config, model.config)
        name, train, valid = store.blocks(lambda: node_blocks(config, node, graph, folder=folder))
        override_routing(model, config)
        bring_to_version(model, store, request)
        config = with_own_limits(config, node, name)
        budget = client_budget(config, node, model, name)
        return cls(config, partition, budget, name, store, model, train, valid, started)

    def train_round(self, request: Request) -> Reply:
        """Evaluate the global model, choose the residents, train them, and pack the selected update."""
        start, before = StartingPoint(self.model), self._evaluate_global()
        training = self.training(request)
        stream = batches(self.train, self.config.batch_size, generator=self._generator(request, BATCH_ORDER))
        if not self._holds_all:
            self._assemble(stream, training, request.server_round)
        hold_residents(self.model, self._residents(), self.config.adapters, seed=request.server_round)
        counter = UsageCounter(read_graph(self.model))
        with visiting(self.model, self.visits()):
            warn_where_fewer_reside(self.model)
            ready = time.time() - self.started
            with counter.counting(self.model):
                result = train_locally(self.model, stream, training)
            start.restore_others(self.model)
            personal = self.evaluate() if request.last else LossSum()
        packed, shipped_density, inclusion = self._pack(
            changes(self.model, start, self.config.adapters), self._score(result, request), request
        )
        numbers = {
            **_loss_numbers("valid", before),
            **_loss_numbers("personal", personal),
            "train-loss": sum(result.losses) / len(result.losses),
            "train-tokens": float(result.tokens),
            "examples": float(len(self.train)),
            "density": shipped_density,
            "start-seconds": max(ready, 0.0),
        }
        return self._reply(
            request,
            {} if self.config.privacy.on else numbers,
            update=packed,
            usage=pack_usage(counter.largest_counts()) if self.config.privacy.counts_usage else b"",
            residents=[held.cpu().numpy() for held in residents(self.model)],
            inclusion=inclusion,
        )

    def evaluate(self) -> LossSum:
        """Loss of the current model on the client's held-out blocks; of none with differential privacy.

        Losses are functions of private data without noise, and are neither computed nor sent then.
        """
        if self.config.privacy.on:
            return LossSum()
        blocks = take(self.valid, self.config.eval_blocks)
        return evaluate_loss(self.model, blocks.input_ids, blocks.labels, autocast=self._autocast)

    def evaluate_round(self, request: Request) -> Reply:
        """Evaluate the global model."""
        return self._reply(request, _loss_numbers("valid", self.evaluate()))

    @property
    def _holds_all(self) -> bool:
        return self.budget in (0, max(self.model.config.num_experts))

    @property
    def _autocast(self) -> bool:
        return autocast_to_bf16(self.config.precision, self.model.device.type)

    def _evaluate_global(self) -> LossSum:
        """Loss of the received model; with all experts resident and no LoRA, these are read into memory first."""
        if self._holds_all and not self.config.lora_rank:
            materialize(self.model, self._residents())
        return self.evaluate()

    def _residents(self) -> list[Tensor | None]:
        return [None] * len(self.model.expert_layers()) if self._holds_all else list(residents(self.model))

    def _assemble(self, stream: Iterator[Batch], training: LocalTraining, server_round: int) -> None:
        """Train the assembler, then set the residents: its choice or the most used experts, by trial training."""
        config = self.config
        graph = read_graph(self.model)
        assembler = self.store.load_assembler(config.seed + self.partition, graph, server_round)
        assemble(
            assembler,
            self.model,
            self.train,
            stream,
            budget=self.budget,
            visits=self.visits(),
            config=config,
            training=training,
            hold=materialize,
        )
        self.store.save_assembler(assembler, graph, server_round)

    def visits(self) -> list[int]:
        """Experts per token, per layer: scaled with the budget unless the run sets experts-per-token."""
        return scaled_visits(self.model, 0 if self.config.experts_per_token else self.budget)

    def training(self, request: Request) -> LocalTraining:
        """Local training of the round that ``request`` asks for."""
        return LocalTraining.of(
            self.config.training,
            autocast=self._autocast,
            first_step=(request.server_round - 1) * self.config.local_steps,
            total_steps=self.config.total_steps,
            keep_moments=self.config.entry_score == "saliency",
        )

    def _score(self, result: LocalResult, request: Request) -> Score:
        """Ranking of the entries that are shipped: by saliency or magnitude, or the common draw of the round."""
        if self.config.entry_score == "shared":
            spans = trained_spans(self.model, self.config.train, attention=self.config.attention_lora)
            return SharedEntries(self.config.seed, request.server_round, spans).score
        return gradient_score(entry_gradient_rms(self.model, result.moments))

    def _pack(
        self, deltas: Mapping[Unit, Tensor], score: Score, request: Request
    ) -> tuple[bytes, float, dict[str, float]]:
        config = self.config
        sizes = unit_sizes(self.model, attention=config.attention_lora)
        request = request.of_partition(self.partition)
        graph = read_graph(self.model)
        residual = carried_over(self.store.load_residual(request.server_round), request, sizes, graph)
        generator = self._generator(request, UPLOAD_SELECTION)
        prepared = choose_shipment(
            self.model,
            deltas,
            score,
            residual,
            config.upload,
            generator=generator,
            in_memory=keeps_changes(config),
        )
        packed = pack_update(prepared.update, value_bits=config.value_bits)
        shipped = shipped_in(request, prepared.update, packed)
        self.store.save_residual(request.server_round, prepared.residual, graph, shipped)
        return packed, density(prepared.update), drawn_with(prepared)

    def _reply(self, request: Request, numbers: dict[str, float], **parts) -> Reply:
        return Reply(
            name=self.name,
            partition=self.partition,
            budget=self.budget,
            version=request.version,
            graph_hash=read_graph(self.model).digest(),
            numbers=numbers,
            **parts,
        )

    def _generator(self, request: Request, purpose: int) -> torch.Generator:
        return round_generator(self.config.seed, request.server_round, self.partition, purpose=purpose)


def _loss_numbers(name: str, loss: LossSum) -> dict[str, float]:
    return {f"{name}-nll": loss.nll, f"{name}-tokens": float(loss.tokens)} if loss.tokens else {}
