"""The reference model of preference training: the base of a model with prompts, used without them or with a copy."""

from __future__ import annotations

import copy
from typing import Any

from torch import Tensor, nn

from ..base.modules import evaluating
from ..hf.adapters import adapter_parameters
from ..models.fused_head import ARGUMENT, TakesFusedHead
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.fast_soft_prompt import FastSoftPrompt
from .acceleration import Accelerated, acceleration_of


def reference_model(tuned: Any, prompt: str | None = None) -> ReferenceModel:
    """A model to compare a tuned one with, for a trainer's ``ref_model=``. It shares the base and copies no weights.

    Args:
        tuned: a :class:`SoftPromptModel`, or a PEFT model that :func:`accelerate` has made fast.
        prompt: the name of a prompt of a SoftPromptModel. The reference uses a copy of it as it is now, which suits a
            prompt that was tuned before. None: the base without a prompt.

    Raises:
        TypeError: another model.
        KeyError: there is no such prompt.
        ValueError: a prompt of an accelerated model; TRL itself keeps a copy of its adapter. Or adapters in the base
            are trained: the reference would change with them.
    """
    if isinstance(tuned, Accelerated):
        if prompt is not None:
            raise ValueError("`prompt` cannot be given with a PEFT model: without `ref_model`, TRL copies its adapter")
        tuned = acceleration_of(tuned).runner
    if not isinstance(tuned, SoftPromptModel):
        raise TypeError(f"`tuned` must be a SoftPromptModel or an accelerated PEFT model, got {type(tuned).__name__}")
    if any(parameter.requires_grad for parameter in adapter_parameters(tuned.base_model)):
        raise ValueError(
            "`tuned` must not train adapters (LoRA and others) of its base, because the reference shares the base and "
            "would change with them; give `ref_model` another model"
        )
    bank = FastSoftPrompt(tuned.prompts.embedding_dim)
    if prompt is not None:
        tuned.prompts[prompt]  # an unknown name raises
        bank = copy.deepcopy(tuned.prompts)
        for name in set(bank.names) - {prompt}:
            bank.remove_prompt(name)
    tuned.has_reference = True
    return ReferenceModel(tuned, bank)


class ReferenceModel(TakesFusedHead):
    """Runs the base of a model with prompts, in evaluation mode. It has no parameters of its own to train or to move.

    Args:
        tuned: the model whose base and layouts are used.
        bank: no prompt, or one.
    """

    def __init__(self, tuned: SoftPromptModel, bank: FastSoftPrompt) -> None:
        super().__init__()
        bank.requires_grad_(False)
        vars(self).update(tuned=tuned, bank=bank)  # not registered: they belong to the tuned model

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return vars(self)["tuned"].config

    def forward(self, input_ids: Tensor | None = None, attention_mask: Tensor | None = None, **options: Any) -> Any:
        """As :meth:`SoftPromptModel.forward`, after the reference's own prompt if it has one."""
        tuned, bank = vars(self)["tuned"], vars(self)["bank"]
        if options.get(ARGUMENT):
            options["head"] = self.fused_head
        bank.to(tuned.device)  # a trainer may have moved the model since
        with evaluating(tuned), evaluating(bank):
            return tuned(input_ids, attention_mask, prompts=bank, **options)

    def state_dict(self, *arguments: Any, **options: Any) -> Any:
        """All numbers that results depend on: TRL stores log-probabilities under their hash."""
        state = nn.Module.state_dict(vars(self)["bank"], *arguments, **options)
        return vars(self)["tuned"].base_model.state_dict(*arguments, **options) | state
