"""The divergence on the top tokens and the rest."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor
from torch.nn.functional import kl_div

from softprompt_fast.distillation.divergence import DistillationLoss, class_log_probabilities, kl_divergence


def test_classes_are_a_distribution() -> None:
    logits = torch.randn(5, 40) * 8
    ids = logits.topk(6).indices
    values = class_log_probabilities(logits, ids)
    torch.testing.assert_close(values.exp().sum(-1), torch.ones(5))
    torch.testing.assert_close(values[:, :-1], logits.log_softmax(-1).gather(-1, ids))


def test_a_rest_too_small_for_a_difference_from_one_keeps_its_gradient() -> None:
    logits = torch.zeros(1, 40)
    logits[0, 0] = 40.0
    logits.requires_grad_()
    rest = class_log_probabilities(logits, torch.tensor([[0]]))[0, -1]
    torch.testing.assert_close(rest, torch.tensor(-40.0 + torch.tensor(39.0).log().item()))
    rest.backward()
    assert logits.grad is not None and logits.grad[0, 1:].min() > 0.02


def plain_classes(logits: Tensor, ids: Tensor) -> Tensor:
    values = logits.log_softmax(-1)
    rest = values.masked_fill(torch.zeros_like(values, dtype=torch.bool).scatter(-1, ids, True), -torch.inf)
    return torch.cat([values.gather(-1, ids), rest.logsumexp(-1, keepdim=True)], -1)


@pytest.mark.parametrize("temperature", [1.0, 2.5])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_values_and_gradients_are_those_of_the_plain_expression(dtype: torch.dtype, temperature: float) -> None:
    logits = (torch.randn(6, 40) * 6).to(dtype)
    logits[0, 7] = 300.0  # the rest has almost no mass
    logits[1, 3:30] = -torch.inf
    ids = torch.stack([torch.randperm(40)[:5] for _ in range(6)])
    weights = torch.randn(6, 6)
    weights[1] = weights[1].masked_fill(torch.cat([logits[1, ids[1]].isinf(), torch.tensor([False])]), 0.0)
    expected = logits.double().requires_grad_()
    values = plain_classes(expected / temperature, ids)
    values.masked_fill(values.isinf(), 0.0).mul(weights).sum().backward()
    logits.requires_grad_()
    found = class_log_probabilities(logits, ids, temperature)
    assert found.dtype == torch.float32 and found.requires_grad
    torch.testing.assert_close(found.double(), values, rtol=1e-5, atol=2e-5)
    found.masked_fill(found.isinf(), 0.0).mul(weights).sum().backward()
    assert logits.grad is not None and logits.grad.dtype == dtype
    tolerance = 1e-5 if dtype == torch.float32 else 1e-2
    torch.testing.assert_close(logits.grad.double(), expected.grad, rtol=tolerance, atol=tolerance)


def test_a_rest_without_any_mass_has_no_gradient() -> None:
    logits = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]], requires_grad=True)
    values = class_log_probabilities(logits, torch.tensor([[0, 1]]))
    assert values[0, -1] == -torch.inf
    values[0, 0].backward()
    assert logits.grad is not None and logits.grad[0, 2:].eq(0).all()
    torch.testing.assert_close(logits.grad[0, :2].sum(), torch.tensor(0.0))


def test_the_divergence_is_the_whole_one_if_all_tokens_are_classes_and_at_most_that() -> None:
    teacher, student = torch.randn(2, 6, 30).double().unbind()
    whole = kl_div(student.log_softmax(-1), teacher.log_softmax(-1), reduction="none", log_target=True).sum(-1)
    previous = torch.zeros(6)
    for count in (1, 5, 15, 29):
        ids = teacher.topk(count).indices
        found = kl_divergence(class_log_probabilities(teacher, ids), class_log_probabilities(student, ids))
        assert (found >= previous - 1e-6).all() and (found >= 0).all()
        previous = found
    torch.testing.assert_close(previous.double(), whole, atol=1e-5, rtol=1e-5)


def test_mass_that_moves_into_the_top_is_a_loss() -> None:
    teacher = torch.tensor([[2.0, 1.0, 0.0, 0.0, 0.0]])
    ids = torch.tensor([[0, 1]])
    target = class_log_probabilities(teacher, ids)
    student = teacher + torch.tensor([[3.0, 3.0, 0.0, 0.0, 0.0]])
    top = (target.exp() * (target - class_log_probabilities(student, ids)))[:, :-1].sum()
    assert top < 0 < kl_divergence(target, class_log_probabilities(student, ids)).item()


def test_impossible_classes_count_nothing() -> None:
    teacher = torch.tensor([[0.0, 1.0, -torch.inf, -torch.inf]])
    ids = torch.tensor([[0, 1]])
    target = class_log_probabilities(teacher, ids)
    found = kl_divergence(target, class_log_probabilities(torch.zeros(1, 4), ids))
    assert torch.isfinite(found).all() and found > 0


def test_the_loss_reads_labelled_places_and_keeps_its_size_for_any_temperature() -> None:
    teacher, student = torch.randn(2, 4, 30).unbind()
    ids = teacher.topk(29).indices
    labels = torch.tensor([3, -100, 5, 6])
    kept = labels != -100
    loss = DistillationLoss(ids[kept], class_log_probabilities(teacher[kept], ids[kept]))
    expected = kl_div(
        student[kept].log_softmax(-1), teacher[kept].log_softmax(-1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(loss(student, labels), expected)
    warm = DistillationLoss(ids[kept], class_log_probabilities(teacher[kept], ids[kept], 2.0), 2.0)
    expected = 4 * kl_div(
        (student[kept] / 2).log_softmax(-1), (teacher[kept] / 2).log_softmax(-1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(warm(student, labels), expected)
    backward = DistillationLoss(ids[kept], class_log_probabilities(teacher[kept], ids[kept]), reverse=True)
    expected = kl_div(
        teacher[kept].log_softmax(-1), student[kept].log_softmax(-1), reduction="batchmean", log_target=True
    )
    torch.testing.assert_close(backward(student, labels), expected)
