"""Small MoE in Qwen2-MoE format: routed experts added to a frozen Llama and trained on text.

As in PESC (Wu et al. 2024, arXiv:2401.02731), each FFN becomes the frozen shared expert of its layer, and only routed
experts and routers are trained.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor
from transformers import (
    LlamaForCausalLM,
    Qwen2MoeConfig,
    Qwen2MoeForCausalLM,
    get_linear_schedule_with_warmup,
)

from federated.data.blocks import Blocks, batches
from models.checkpoints.load import load_dense
from models.graph.router_losses import Routing, router_loss

# Weight of the load-balance loss; large because training is short.
BALANCE_WEIGHT = 0.1


def grow(path: str, *, experts: int, top_k: int, neurons: int, seed: int) -> Qwen2MoeForCausalLM:
    """Qwen2-MoE that initially computes the same function as the Llama in ``path``, fp32.

    Args:
        path: folder of the Llama.
        experts: routed experts per layer. Their down projections are zero, their gate and up rows equal.
        top_k: experts per token.
        neurons: neurons of a routed expert, drawn from the FFN.
        seed: seed of that draw and of the routers.
    """
    dense = load_dense(path).float()
    torch.manual_seed(seed)
    moe = Qwen2MoeForCausalLM(_config(dense, experts, top_k, neurons))
    others = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    moe.load_state_dict(others, strict=False)
    with torch.no_grad():
        for source, target in zip(dense.model.layers, moe.model.layers, strict=True):
            gate, up, down = (getattr(source.mlp, f"{name}_proj").weight for name in ("gate", "up", "down"))
            shared, chosen = target.mlp.shared_expert, torch.randperm(len(gate))[:neurons]
            shared.gate_proj.weight.copy_(gate)
            shared.up_proj.weight.copy_(up)
            # The sigmoid gate of the shared expert is one half at zero weights.
            target.mlp.shared_expert_gate.weight.zero_()
            shared.down_proj.weight.copy_(2 * down)
            rows = torch.cat([gate[chosen], up[chosen]])
            target.mlp.experts.gate_up_proj.copy_(rows.expand_as(target.mlp.experts.gate_up_proj))
            target.mlp.experts.down_proj.zero_()
    return moe


def train_moe(
    moe: Qwen2MoeForCausalLM,
    text: Blocks,
    *,
    steps: int,
    batch_size: int,
    learning_rate: float,
    autocast: bool,
    seed: int,
    on_step: Callable[[int], None] = lambda done: None,
) -> None:
    """Train routed experts and routers with AdamW, linear decay of the learning rate and a load-balance loss per layer.

    Args:
        moe: trained in place.
        text: training blocks.
        steps: optimizer steps.
        batch_size: blocks per step.
        learning_rate: peak learning rate.
        autocast: run matrix products in bf16.
        seed: seed of the order of the blocks.
        on_step: called with the number of steps done.
    """
    for name, parameter in moe.named_parameters():
        parameter.requires_grad_(".mlp.experts." in name or ".mlp.gate." in name)
    trained = [parameter for parameter in moe.parameters() if parameter.requires_grad]
    optimizer = torch.optim.AdamW(trained, lr=learning_rate, fused=True)
    schedule = get_linear_schedule_with_warmup(optimizer, steps // 20, steps)
    stream = batches(text, batch_size, generator=torch.Generator().manual_seed(seed))
    moe.train()
    for step, (input_ids, labels) in zip(range(steps), stream, strict=False):
        loss = _loss(moe, input_ids, labels, autocast)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        on_step(step + 1)
    moe.eval()


def _loss(moe: Qwen2MoeForCausalLM, input_ids: Tensor, labels: Tensor, autocast: bool) -> Tensor:
    with torch.autocast("cpu", dtype=torch.bfloat16, enabled=autocast):
        output = moe(input_ids=input_ids, labels=labels, use_cache=False, output_router_logits=True)
    # The load-balance loss of transformers averages over layers, which leaves the load of each layer uneven.
    routings = [
        Routing(logits.float(), logits.topk(moe.config.num_experts_per_tok, -1).indices, None)
        for logits in output.router_logits
    ]
    return output.loss + router_loss(routings, load_balance_weight=BALANCE_WEIGHT)


def _config(dense: LlamaForCausalLM, experts: int, top_k: int, neurons: int) -> Qwen2MoeConfig:
    ours = dense.config
    return Qwen2MoeConfig(
        vocab_size=ours.vocab_size,
        hidden_size=ours.hidden_size,
        num_hidden_layers=ours.num_hidden_layers,
        num_attention_heads=ours.num_attention_heads,
        num_key_value_heads=ours.num_key_value_heads,
        hidden_act=ours.hidden_act,
        max_position_embeddings=ours.max_position_embeddings,
        rms_norm_eps=ours.rms_norm_eps,
        rope_parameters=ours.rope_parameters,
        tie_word_embeddings=ours.tie_word_embeddings,
        bos_token_id=ours.bos_token_id,
        eos_token_id=ours.eos_token_id,
        pad_token_id=None,
        qkv_bias=False,
        shared_expert_intermediate_size=ours.intermediate_size,
        moe_intermediate_size=neurons,
        num_experts=experts,
        num_experts_per_tok=top_k,
        norm_topk_prob=True,
        router_aux_loss_coef=0.0,
    )
