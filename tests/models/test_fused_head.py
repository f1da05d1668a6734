"""Log-probabilities, entropies and their gradients, as TRL's trainers ask for them; TRL is not needed here."""

from __future__ import annotations

import pytest
import torch

from softprompt_fast.models import fused_head
from softprompt_fast.models.fused_head import FusedHead, _Scores

ROWS, VOCABULARY = 7, 11


def inputs(dtype: torch.dtype = torch.float64) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(ROWS, VOCABULARY, dtype=dtype) * 3, torch.randint(VOCABULARY, (ROWS,))


@pytest.fixture(params=[3, 256])
def rows_at_once(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(fused_head, "ROWS_AT_ONCE", request.param)


@pytest.mark.usefixtures("rows_at_once")
def test_values() -> None:
    logits, targets = inputs()
    targets[0] = logits[0].argmax()
    log_probs, entropy, squares, mean, top = _Scores.apply(logits, targets, 0.5, True)
    distribution = torch.distributions.Categorical(logits=logits / 2)
    torch.testing.assert_close(log_probs, distribution.log_prob(targets))
    torch.testing.assert_close(entropy, distribution.entropy())
    torch.testing.assert_close(squares, distribution.probs.square().sum(1).log())
    torch.testing.assert_close(mean, logits.mean(1) / 2)
    assert torch.equal(top, logits.argmax(1) == targets) and top[0]


@pytest.mark.usefixtures("rows_at_once")
@pytest.mark.parametrize("which", [slice(0, 1), slice(1, 2), slice(0, 2)])
def test_gradients(which: slice) -> None:
    logits, targets = inputs()
    assert torch.autograd.gradcheck(
        lambda values: _Scores.apply(values, targets, 0.5, True)[which], logits.requires_grad_()
    )


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_is_computed_in_float32(dtype: torch.dtype) -> None:
    logits, targets = inputs(dtype)
    logits.requires_grad_()
    log_probs = _Scores.apply(logits, targets, 1.0, False)[0]
    assert log_probs.dtype == torch.float32
    torch.testing.assert_close(log_probs, logits.float().log_softmax(1)[torch.arange(ROWS), targets])
    log_probs.sum().backward()
    assert logits.grad is not None and logits.grad.dtype == dtype


def test_no_rows() -> None:
    logits = torch.zeros(0, VOCABULARY, requires_grad=True)
    values = _Scores.apply(logits, torch.zeros(0, dtype=torch.int64), 1.0, True)
    assert [len(value) for value in values] == [0] * 5
    values[0].sum().backward()


def test_other_forwards_are_not_taken_for_trls() -> None:
    class Plain(torch.nn.Module):
        def forward(self, fused: bool = False) -> None: ...

    def own(self: object, fused_lm_head: bool = False) -> None: ...

    assert FusedHead.of(Plain().forward) is None and FusedHead.of(len) is None and FusedHead.of(None) is None
    with pytest.raises(TypeError, match="this version of TRL is not supported: its forward has no setting `temp"):
        FusedHead.of(own.__get__(Plain()))
