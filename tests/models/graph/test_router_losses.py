from __future__ import annotations

import pytest
import torch
from transformers.models.mixtral.modeling_mixtral import load_balancing_loss_func

from models.graph.router_losses import Routing, collect_routing, load_balance_loss, router_loss, z_loss
from models.graph.runtime_settings import checkpointing, set_residents
from tests.support.tiny_graphs import graph_of, random_ids, shared_graph_of, with_random_gains


def scores_of(tokens: int = 50, experts: int = 6, *, seed: int = 0) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    return torch.randn(tokens, experts, generator=generator, requires_grad=True)


def top_k(scores: torch.Tensor, k: int) -> Routing:
    return Routing(scores, scores.topk(k, -1).indices, None)


@pytest.mark.parametrize("k", [1, 2, 6])
def test_the_load_balance_loss_is_mixtrals_per_visit(k):
    scores = scores_of()
    # Mixtral's counts the share of tokens that visit an expert, which adds up to k over the experts.
    expected = load_balancing_loss_func((scores,), num_experts=6, top_k=k) / k
    mine = load_balance_loss(top_k(scores, k))
    torch.testing.assert_close(mine, expected)
    (gradient,) = torch.autograd.grad(mine, scores)
    (reference,) = torch.autograd.grad(expected, scores)
    torch.testing.assert_close(gradient, reference)


def test_an_even_load_costs_one_and_one_expert_for_all_costs_the_number_of_experts():
    even = Routing(torch.zeros(4, 4), torch.arange(4)[:, None], None)
    assert load_balance_loss(even).item() == pytest.approx(1.0)
    scores = torch.zeros(5, 4)
    scores[:, 2] = 100.0
    assert load_balance_loss(top_k(scores, 1)).item() == pytest.approx(4.0)


def test_descent_on_the_load_balance_loss_spreads_the_load():
    scores = torch.zeros(8, 4)
    scores[:, 0] = 1.0
    scores.requires_grad_(True)
    load_balance_loss(top_k(scores, 1)).backward()
    assert (scores.grad[:, 0] > 0).all() and (scores.grad[:, 1:] < 0).all()


def test_the_z_loss_is_the_mean_square_of_the_log_partition():
    scores = scores_of()
    expected = torch.log(torch.exp(scores).sum(-1)).pow(2).mean()
    torch.testing.assert_close(z_loss(top_k(scores, 2)), expected)
    assert z_loss(Routing(torch.full((3, 4), -1.0), torch.zeros(3, 1, dtype=torch.int64), None)) == (
        pytest.approx((torch.tensor(4.0).log() - 1).square().item())
    )


def test_only_residents_count():
    scores, held = scores_of(experts=6), torch.tensor([True, False, True, True, False, False])
    chosen = scores.masked_fill(~held, float("-inf")).topk(2, -1).indices
    routing = Routing(scores, chosen, held)
    within = scores[:, held]
    alone = Routing(within, within.topk(2, -1).indices, None)
    torch.testing.assert_close(load_balance_loss(routing), load_balance_loss(alone))
    torch.testing.assert_close(z_loss(routing), z_loss(alone))
    (load_balance_loss(routing) + z_loss(routing)).backward()
    assert scores.grad.isfinite().all()
    assert not scores.grad[:, ~held].any() and scores.grad[:, held].all()


def test_visits_that_are_not_made_do_not_count():
    scores, visits = torch.zeros(4, 2), torch.tensor([[0, -1], [0, 1], [1, -1], [1, -1]])
    scores[:, 0] = 2.0
    share = torch.softmax(torch.tensor([2.0, 0.0]), 0)
    expected = 2 * (2 / 5 * share[0] + 3 / 5 * share[1])
    torch.testing.assert_close(load_balance_loss(Routing(scores, visits, None)), expected)


def test_the_losses_are_weighted_and_averaged_over_layers():
    layers = [top_k(scores_of(seed=seed), 2) for seed in (0, 1)]
    balance = sum(load_balance_loss(layer) for layer in layers) / 2
    size = sum(z_loss(layer) for layer in layers) / 2
    torch.testing.assert_close(router_loss(layers, load_balance_weight=0.5), 0.5 * balance)
    torch.testing.assert_close(router_loss(layers, z_loss_weight=3.0), 3 * size)
    both = router_loss(layers, load_balance_weight=0.5, z_loss_weight=3.0)
    torch.testing.assert_close(both, 0.5 * balance + 3 * size)


def test_the_routing_of_every_layer_is_collected_with_its_gradient():
    model, ids = with_random_gains(graph_of(visits=2)), random_ids(graph_of(), 2, 8)
    held = torch.tensor([True, True, False, True])
    set_residents(model, [held, None])
    with collect_routing(model) as routings:
        model(input_ids=ids, use_cache=False)
    model(input_ids=ids, use_cache=False)
    first, second = routings
    assert first.resident_E is held and second.resident_E is None
    assert first.scores_TE.shape == (16, 4) and first.experts_TK.shape == (16, 2)
    router_loss(routings, load_balance_weight=1.0, z_loss_weight=1.0).backward()
    for layer, kept in zip(model.expert_layers(), (held, torch.ones(4, dtype=torch.bool)), strict=True):
        assert layer.router.weight.grad[kept].any(-1).all() and not layer.router.weight.grad[~kept].any()


def test_layers_that_run_again_for_their_gradient_give_the_same_routing_and_gradient():
    gradients = []
    for repeat in (False, True):
        model, ids = with_random_gains(graph_of(visits=2)).train(), random_ids(graph_of(), 2, 8)
        with collect_routing(model) as routings:
            if repeat:
                with checkpointing(model):
                    loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                    (loss + router_loss(routings, z_loss_weight=1.0, load_balance_weight=1.0)).backward()
            else:
                loss = model(input_ids=ids, labels=ids, use_cache=False).loss
                (loss + router_loss(routings, z_loss_weight=1.0, load_balance_weight=1.0)).backward()
        assert len(routings) == 2
        gradients.append([layer.router.weight.grad for layer in model.expert_layers()])
    assert all(torch.equal(one, other) for one, other in zip(*gradients, strict=True))


def test_shared_experts_are_left_out_of_the_load_balance():
    scores = scores_of(experts=6)
    chosen = torch.cat([torch.arange(2).expand(50, -1), scores[:, 2:].topk(2, -1).indices + 2], -1)
    within = scores[:, 2:]
    alone = load_balance_loss(Routing(within, within.topk(2, -1).indices, None))
    found = load_balance_loss(Routing(scores, chosen, None, 2))
    torch.testing.assert_close(found, alone)
    found.backward()
    assert not scores.grad[:, :2].any() and scores.grad[:, 2:].all()
    assert load_balance_loss(Routing(scores, chosen[:, :2], None, 2)).item() == 0


def test_routing_is_collected_with_the_shared_experts_of_the_layer():
    model = shared_graph_of()
    with collect_routing(model) as routings:
        model(input_ids=random_ids(model, 1, 10))
    assert [routing.num_shared for routing in routings] == [2, 2]
    assert router_loss(routings, load_balance_weight=1.0) >= 1
