"""Prompts computed from other parameters: what each form computes, folds to, and does to a bank."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from support.tiny_models import batch, build
from torch import nn

import softprompt_fast as spf
from softprompt_fast.prompts.placement import FixedFirst
from softprompt_fast.prompts.reparameterization import (
    LowRank,
    NormBound,
    Offset,
    PromptDropout,
    ResidualMLP,
    SharedPart,
    fold,
    reparameterize,
)

P, D = 5, 32
FORMS: dict[str, Callable[[torch.Tensor], nn.Module]] = {
    "offset": Offset,
    "residual": lambda p: ResidualMLP(D, 7),
    "low-rank": lambda p: LowRank(P, D, 2),
    "norm": lambda p: NormBound(100.0),
    "dropout": lambda p: PromptDropout(0.5),
    "fixed first": lambda p: FixedFirst(p[0]),
}


def a_bank(form: str | None = None) -> tuple[spf.FastSoftPrompt, torch.Tensor]:
    torch.manual_seed(0)
    bank = spf.FastSoftPrompt(D)
    values = torch.randn(P, D)
    bank.add_prompt("a", init=values)
    bank.add_prompt("other", init=torch.randn(2, D))
    if form is not None:
        reparameterize(bank, "a", FORMS[form](values))
    return bank, values


@pytest.mark.parametrize("form", FORMS)
def test_every_form_starts_as_the_prompt_it_is_put_on(form: str) -> None:
    bank, values = a_bank(form)
    assert torch.allclose(bank.snapshot("a"), values, atol=1e-6)
    assert bank.lengths == {"a": P, "other": 2}


@pytest.mark.parametrize("form", FORMS)
def test_training_moves_the_prompt_and_folding_keeps_its_values(form: str) -> None:
    bank, values = a_bank(form)
    tuned = spf.SoftPromptModel(build("llama"), bank)
    optimizer = torch.optim.AdamW([p for p in bank.parameters() if p.requires_grad], lr=0.05, weight_decay=0)
    ids, mask = batch()
    for _ in range(4):
        optimizer.zero_grad()
        tuned(ids, mask, ids.masked_fill(mask == 0, -100), ["a", "other", None, "a"]).loss.backward()
        optimizer.step()
    after = bank.snapshot("a")
    assert not torch.allclose(after[1:], values[1:], atol=1e-3)
    tuned.eval()
    computed = tuned(ids, mask, prompt_ids="a").logits
    parameter = fold(bank, "a")
    assert type(bank) is spf.FastSoftPrompt and parameter.requires_grad and parameter.is_leaf
    assert torch.equal(parameter.detach(), after)
    assert torch.equal(tuned(ids, mask, prompt_ids="a").logits, computed)


def test_weight_decay_of_the_offset_is_a_decay_to_the_initial_prompt() -> None:
    bank, values = a_bank("offset")
    with torch.no_grad():
        bank.forms("a").original.add_(1.0)
    for parameter in bank.parameters():
        parameter.grad = torch.zeros_like(parameter)
    torch.optim.AdamW(bank.parameters(), lr=0.1, weight_decay=0.5).step()
    assert torch.allclose(bank.snapshot("a"), values + 1 - 0.1 * 0.5, atol=1e-6)


def test_low_rank_updates_have_that_rank_and_train_only_the_factors() -> None:
    bank, values = a_bank("low-rank")
    trained = {name for name, p in bank.named_parameters() if p.requires_grad and ".prompt_a" in name}
    assert {name.rsplit(".", 1)[-1] for name in trained} == {"a", "b"}
    with torch.no_grad():
        bank.forms("a")[0].b.normal_()
    assert torch.linalg.matrix_rank(bank.snapshot("a") - values, rtol=1e-4) == 2


def test_the_residual_form_is_the_papers_mlp() -> None:
    bank, values = a_bank("residual")
    mlp = bank.forms("a")[0]
    with torch.no_grad():
        mlp.norm.weight.normal_()
    hidden = (values @ mlp.down.weight.T + mlp.down.bias).clamp(min=0) @ mlp.up.weight.T + mlp.up.bias
    normed = (hidden - hidden.mean(1, keepdim=True)) / (hidden.var(1, keepdim=True, unbiased=False) + 1e-5).sqrt()
    assert torch.allclose(bank.snapshot("a"), values + normed * mlp.norm.weight, atol=1e-5)


def test_the_norm_bound_shortens_only_what_is_longer() -> None:
    bank, values = a_bank()
    norms = values.norm(dim=1)
    bound = norms.median().item()
    reparameterize(bank, "a", NormBound(bound))
    bounded = bank.snapshot("a")
    assert torch.allclose(bounded.norm(dim=1), norms.clamp(max=bound), atol=1e-5)
    assert torch.equal(bounded[norms < bound], values[norms < bound])


def test_dropout_drops_in_training_only_and_keeps_the_mean() -> None:
    bank, values = a_bank("dropout")
    seen = torch.stack([bank["a"].detach() for _ in range(600)])
    assert 0.45 < (seen == 0).float().mean() < 0.55
    assert torch.allclose(seen.mean(0), values, atol=0.6)
    assert torch.equal(bank.snapshot("a"), values) and bank.training
    bank.eval()
    assert torch.equal(bank["a"].detach(), values)


def test_a_shared_part_stands_in_front_of_each_prompt_and_is_one_parameter() -> None:
    bank, values = a_bank()
    shared = nn.Parameter(torch.randn(3, D))
    other = bank.snapshot("other")
    for name in ("a", "other"):
        reparameterize(bank, name, SharedPart(shared))
    assert torch.equal(bank.snapshot("a"), torch.cat([shared, values])) and bank.lengths == {"a": 8, "other": 5}
    assert sum(p is shared for p in bank.parameters()) == 1
    tuned = spf.SoftPromptModel(build("llama"), bank)
    ids, mask = batch()
    tuned(ids, mask, ids, ["a", "other", "a", None]).loss.backward()
    both = shared.grad
    assert both is not None and both.abs().min() > 0
    fold(bank, "a")
    fold(bank, "other")
    assert torch.equal(bank.snapshot("other"), torch.cat([shared, other]))


@pytest.mark.parametrize("form", FORMS)
def test_parametrized_prompts_are_renamed_frozen_and_removed(form: str) -> None:
    bank, values = a_bank(form)
    parameters = {id(p) for p in bank.forms("a").parameters()}
    bank.rename_prompt("a", "b")
    assert bank.names == ["b", "other"] and torch.allclose(bank.snapshot("b"), values, atol=1e-6)
    assert {id(p) for p in bank.forms("b").parameters()} == parameters
    bank.freeze_prompt("b")
    assert not any(p.requires_grad for p in bank.forms("b").parameters()) and bank["other"].requires_grad
    bank.remove_prompt("b")
    assert bank.names == ["other"] and [n for n, _ in bank.named_parameters()] == ["prompt_other"]


def test_forms_stack_in_order_and_their_state_is_loaded_back() -> None:
    bank, values = a_bank("offset")
    for form in ("residual", "norm", "dropout"):
        reparameterize(bank, "a", FORMS[form](values))
    with torch.no_grad():
        for parameter in bank.forms("a").parameters():
            parameter.add_(0.3)
    again, _ = a_bank("offset")
    for form in ("residual", "norm", "dropout"):
        reparameterize(again, "a", FORMS[form](values))
    assert not torch.equal(again.snapshot("a"), bank.snapshot("a"))
    again.load_state_dict(bank.state_dict())
    assert torch.equal(again.snapshot("a"), bank.snapshot("a"))


def test_saving_in_training_writes_values_without_dropout(tmp_path) -> None:  # type: ignore[no-untyped-def]
    bank, values = a_bank("dropout")
    tuned = spf.SoftPromptModel(build("llama"), bank).train()
    tuned.save_pretrained(tmp_path)
    assert torch.equal(tuned.read_prompt(tmp_path / "a"), values)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: LowRank(P, D, 6), "`rank` must be 1 to 5"),
        (lambda: NormBound(0.0), "`norm_bound` must be positive"),
        (lambda: PromptDropout(1.0), "`prompt_dropout` must be at least 0 and below 1"),
    ],
)
def test_bad_settings_are_refused(make: Callable[[], nn.Module], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        make()
