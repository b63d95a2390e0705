from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from models.healing.losses import hidden_distance, logit_divergence


def random_case(tokens: int) -> list[torch.Tensor]:
    """Student states, student head, teacher states, teacher head."""
    generator = torch.Generator().manual_seed(tokens)
    shapes = ((tokens, 8), (50, 8), (tokens, 6), (50, 6))
    return [torch.randn(*shape, generator=generator, dtype=torch.float64) for shape in shapes]


@pytest.mark.parametrize("tokens", [1, 7, 256, 600])
@pytest.mark.parametrize("temperature", [1.0, 2.5])
def test_divergence_and_gradient_equal_torch_kl_div(tokens, temperature):
    student, head, teacher, teacher_head = random_case(tokens)
    gradients, values = [], []
    for ours in (True, False):
        states = student.clone().requires_grad_()
        if ours:
            value = logit_divergence(states, head, teacher, teacher_head, temperature)
        else:
            log_student = torch.log_softmax(states @ head.T / temperature, -1)
            log_teacher = torch.log_softmax(teacher @ teacher_head.T / temperature, -1)
            value = F.kl_div(log_student, log_teacher, reduction="sum", log_target=True) * temperature**2
        (3 * value).backward()
        values.append(value.detach().double())
        gradients.append(states.grad)
    torch.testing.assert_close(values[0], values[1], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(gradients[0], gradients[1], rtol=1e-4, atol=1e-5)


def test_equal_models_have_no_divergence_and_no_gradient():
    _, _, teacher, head = random_case(5)
    states = teacher.clone().requires_grad_()
    value = logit_divergence(states, head, teacher, head)
    value.backward()
    assert float(value.detach()) == pytest.approx(0.0, abs=1e-6)
    assert states.grad.abs().max() < 1e-6


def test_heads_receive_no_gradient():
    student, head, teacher, teacher_head = random_case(3)
    student.requires_grad_(), head.requires_grad_()
    logit_divergence(student, head, teacher, teacher_head).backward()
    assert student.grad is not None and head.grad is None


def test_distance_of_hidden_states_is_relative_to_the_teacher():
    teacher = torch.tensor([[3.0, 4.0], [0.0, 2.0]])
    student = torch.tensor([[3.0, 4.0], [0.0, 3.0]])
    assert float(hidden_distance([student], [teacher])) == pytest.approx(1 / 4)
    assert float(hidden_distance([student, teacher], [teacher, teacher])) == pytest.approx(1 / 8)
    assert float(hidden_distance([10 * student], [10 * teacher])) == pytest.approx(1 / 4)
