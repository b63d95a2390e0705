"""A small mixture of experts, upcycled from a trained Llama and trained on text.

Sparse upcycling: Komatsuzaki et al. 2023 (arXiv:2212.05055). Every expert starts as a copy of the dense FFN; since the
gates of a token sum to one, the mixture starts as the Llama, and its experts part as they are trained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM, get_linear_schedule_with_warmup

from federated.blocks import Blocks, batches
from models.llama_loader import load_dense
from models.router_losses import Routing, router_loss

# Of the load-balance loss: strong, since training is short.
BALANCE_WEIGHT = 0.1


def upcycle(path: str, *, experts: int, top_k: int, seed: int) -> MixtralForCausalLM:
    """A Mixtral whose experts are copies of the FFNs of the Llama in ``path``, and random routers, fp32."""
    dense = load_dense(path).float()
    torch.manual_seed(seed)
    moe = MixtralForCausalLM(_config(dense, experts, top_k))
    shared = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    moe.load_state_dict(shared, strict=False)
    with torch.no_grad():
        for source, target in zip(dense.model.layers, moe.model.layers, strict=True):
            mlp, fused = source.mlp, target.mlp.experts
            fused.gate_up_proj.copy_(
                torch.cat([mlp.gate_proj.weight, mlp.up_proj.weight]).expand_as(fused.gate_up_proj)
            )
            fused.down_proj.copy_(mlp.down_proj.weight.expand_as(fused.down_proj))
    return moe


def train_moe(
    moe: MixtralForCausalLM,
    text: Blocks,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    autocast: bool,
    seed: int,
    on_step: Callable[[int], None] = lambda done: None,
) -> None:
    """Train all weights with AdamW, the rate falling linearly, and a load-balance loss of each layer."""
    optimizer = torch.optim.AdamW(moe.parameters(), lr=learning_rate, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    stream = batches(text, batch_size, generator=torch.Generator().manual_seed(seed))
    moe.train()
    for step, (input_ids, labels) in zip(range(steps), stream, strict=False):
        loss = _loss(moe, input_ids, labels, autocast)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(moe.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1)
    moe.eval()


def _loss(moe: MixtralForCausalLM, input_ids: Tensor, labels: Tensor, autocast: bool) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = moe(input_ids=input_ids, labels=labels, use_cache=False, output_router_logits=True)
    # transformers' own loss balances the load over all layers together, and leaves it uneven in each.
    routings = [
        Routing(logits.float(), logits.topk(moe.config.num_experts_per_tok, -1).indices, None)
        for logits in output.router_logits
    ]
    return output.loss + router_loss(routings, load_balance_weight=BALANCE_WEIGHT)


def _config(dense: LlamaForCausalLM, experts: int, top_k: int) -> MixtralConfig:
    ours = dense.config
    return MixtralConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        intermediate_size=ours.intermediate_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.num_key_value_heads,
        head_dim=ours.head_dim,
        hidden_act=ours.hidden_act,
        max_position_embeddings=ours.max_position_embeddings,
        rms_norm_eps=ours.rms_norm_eps,
        rope_parameters=ours.rope_parameters,
        tie_word_embeddings=ours.tie_word_embeddings,
        bos_token_id=ours.bos_token_id,
        eos_token_id=ours.eos_token_id,
        pad_token_id=None,
        num_local_experts=experts,
        num_experts_per_tok=top_k,
        router_aux_loss_coef=0.0,
        sliding_window=None,
    )
