"""Losses of distillation: divergence of the teacher's next-token distribution, and distance of hidden states.

Shape suffixes: T tokens, D hidden width, V vocabulary, L layers.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

_CHUNK = 256  # tokens whose logits are in memory at a time


def logit_divergence(
    student_TD: Tensor,
    student_head_VD: Tensor,
    teacher_TD: Tensor,
    teacher_head_VD: Tensor,
    temperature: float = 1.0,
) -> Tensor:
    """Kullback-Leibler divergence of the teacher's distribution from the student's, in nats, summed over tokens.

    It is multiplied by the squared temperature, so that gradients have the same scale for any (Hinton et al., 2015,
    arXiv:1503.02531). The gradient reaches ``student_TD`` only. Logits of 256 tokens are in memory at a time.

    Args:
        student_TD: hidden states of the student before its output head.
        student_head_VD: weight of the student's output head.
        teacher_TD: hidden states of the teacher.
        teacher_head_VD: weight of the teacher's output head.
        temperature: divisor of the logits.
    """
    return _LogitDivergence.apply(student_TD, student_head_VD, teacher_TD, teacher_head_VD, temperature)


class _LogitDivergence(torch.autograd.Function):
    """``logit_divergence``; its gradient is computed in the forward pass, chunk by chunk."""

    @staticmethod
    def forward(ctx: Any, student_TD, student_head_VD, teacher_TD, teacher_head_VD, temperature):
        """Sum over tokens; saves the gradient of ``student_TD``."""
        total = student_TD.new_zeros((), dtype=torch.float32)
        gradients = []
        for student, teacher in zip(student_TD.split(_CHUNK), teacher_TD.split(_CHUNK), strict=True):
            log_student = _log_probabilities(student, student_head_VD, temperature)
            log_teacher = _log_probabilities(teacher, teacher_head_VD, temperature)
            difference = log_teacher - log_student
            probabilities = log_teacher.exp_()
            total += (probabilities * difference).sum() * temperature**2
            excess = log_student.exp_().sub_(probabilities)
            gradients.append((excess.to(student.dtype) @ student_head_VD) * temperature)
        ctx.save_for_backward(torch.cat(gradients))
        return total

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, d_total: Tensor):
        """Gradient of ``student_TD``; None for the other arguments."""
        (gradient,) = ctx.saved_tensors
        return gradient * d_total.to(gradient.dtype), None, None, None, None


def _log_probabilities(hidden_TD: Tensor, head_VD: Tensor, temperature: float) -> Tensor:
    logits_TV = F.linear(hidden_TD, head_VD).float()
    return torch.log_softmax(logits_TV.div_(temperature), -1)


def hidden_distance(students: Sequence[Tensor], teachers: Sequence[Tensor]) -> Tensor:
    """Squared distance of hidden states over the squared norm of the teacher's, mean over layers, sum over tokens.

    Args:
        students: hidden states of each layer, ``[T, D]``.
        teachers: hidden states of the same layers.
    """
    ratios = [
        ((student.float() - teacher.float()).square().sum(-1) / teacher.float().square().sum(-1)).sum()
        for student, teacher in zip(students, teachers, strict=True)
    ]
    return torch.stack(ratios).mean()
