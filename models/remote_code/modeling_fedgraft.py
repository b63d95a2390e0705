"""Llama whose FFN layers are expert graphs, for ``trust_remote_code``: imports torch and transformers only."""

from __future__ import annotations

import os
from typing import Any

import torch
from transformers import LlamaForCausalLM, LlamaModel, LlamaPreTrainedModel

# Transformers 4.57 copies only those modules of a local checkpoint that this file imports itself.
from .attached_fedgraft import __doc__ as _attached  # noqa: F401
from .configuration_fedgraft import FedGraftConfig
from .decode_fedgraft import __doc__ as _decode  # noqa: F401
from .default_fedgraft import __doc__ as _default  # noqa: F401
from .dense_path_fedgraft import __doc__ as _dense_path  # noqa: F401
from .dispatch_fedgraft import __doc__ as _dispatch  # noqa: F401
from .execution_fedgraft import __doc__ as _execution  # noqa: F401
from .experts_fedgraft import ROUTING, ExpertGraphMLP
from .router_fedgraft import ROUTER_KEY_MAPPING, stored_name
from .routing_fedgraft import __doc__ as _routing  # noqa: F401
from .weights_fedgraft import __doc__ as _weights  # noqa: F401

try:  # skips tensors that are loaded; transformers 4.57 skips whole modules instead
    from transformers import initialization as init
except ImportError:
    from torch.nn import init  # type: ignore[no-redef]


class FedGraftPreTrainedModel(LlamaPreTrainedModel):
    """Base of the two models: fresh weights, and tensor names of checkpoints (see ``router_fedgraft``)."""

    config_class = FedGraftConfig
    # Routing parameters stay in fp32 for experts of any dtype.
    _keep_in_fp32_modules_strict = list(ROUTING)

    @torch.no_grad()
    def _init_weights(self, module):
        super()._init_weights(module)
        init_expert_graph(module, self.config.initializer_range)

    def post_init(self):
        """Complete the construction; skipped where Llama's constructors call it, before the experts are there."""
        if any(isinstance(module, ExpertGraphMLP) for module in self.modules()):
            super().post_init()

    @classmethod
    def from_pretrained(cls, *args: Any, key_mapping: dict[str, str] | None = None, **options: Any):
        """Load a checkpoint; arguments as in ``PreTrainedModel.from_pretrained``."""
        return super().from_pretrained(*args, key_mapping=ROUTER_KEY_MAPPING | (key_mapping or {}), **options)

    def save_pretrained(
        self,
        save_directory: str | os.PathLike,
        is_main_process: bool = True,
        state_dict: dict | None = None,
        *args: Any,
        **options: Any,
    ):
        """Write a checkpoint; arguments as in ``PreTrainedModel.save_pretrained``."""
        tensors = self.state_dict() if state_dict is None else state_dict
        stored = {stored_name(name): tensor for name, tensor in tensors.items()}
        super().save_pretrained(save_directory, is_main_process, stored, *args, **options)


class FedGraftModel(FedGraftPreTrainedModel, LlamaModel):
    """Decoder stack with Llama's attention, norms and embeddings, and expert graphs as FFN layers."""

    def __init__(self, config: FedGraftConfig):
        super().__init__(config)
        fitted = config.default_experts or config.num_experts
        counts = zip(
            self.layers, config.num_experts, config.num_shared, fitted, config.attached_per_layer, strict=True
        )
        for index, (layer, num_experts, num_shared, default_experts, attached) in enumerate(counts):
            layer.mlp = ExpertGraphMLP(
                hidden_size=config.hidden_size,
                expert_size=config.expert_size,
                num_experts=num_experts,
                num_visits=min(config.experts_per_token, num_experts),
                num_shared=num_shared,
                default_rank=config.default_rank,
                default_experts=default_experts,
                attached=attached,
                activation=config.hidden_act,
                order=config.walk,
                layer_index=index,
            )
        self.post_init()


class FedGraftForCausalLM(FedGraftPreTrainedModel, LlamaForCausalLM):
    """Causal language model over ``FedGraftModel``; the API is that of ``LlamaForCausalLM``."""

    def __init__(self, config: FedGraftConfig):
        super().__init__(config)
        self.model = FedGraftModel(config)
        self.post_init()

    def expert_layers(self) -> list[ExpertGraphMLP]:
        """Expert graphs of the decoder layers, in order."""
        return [layer.mlp for layer in self.model.layers]

    def expert_layer(self, index: int) -> ExpertGraphMLP:
        """Expert graph of one decoder layer."""
        return self.model.layers[index].mlp


def init_expert_graph(module, std: float) -> None:
    """Initialize an expert layer: normal weights, every expert a root, no edges, zero gains."""
    if not isinstance(module, ExpertGraphMLP):
        return
    for weight in (module.gate_up_proj, module.down_proj, module.router.weight):
        init.normal_(weight, mean=0.0, std=std)
    for gain in (module.edge_gain, module.edge_affinity, module.output_gain):
        init.zeros_(gain)
    if module.default is not None:
        init.normal_(module.default.down, mean=0.0, std=std)
        for zero in (module.default.up, module.default.bias):
            init.zeros_(zero)
    copy = getattr(init, "copy_", torch.Tensor.copy_)
    copy(module.edges, torch.eye(module.num_experts, dtype=torch.bool))
    copy(module.neurons, torch.arange(module.neurons.numel()).view_as(module.neurons))


__all__ = ["FedGraftForCausalLM", "FedGraftModel"]
