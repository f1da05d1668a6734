"""TRL's trainers whose reference model shares the base with the trained model: no second copy is loaded.

TRL's own classes load a copy of the base, unless the trained model is PEFT's or ``ref_model=`` is given.
"""

from __future__ import annotations

from typing import Any

import trl

from ..models.soft_prompt_model import SoftPromptModel
from .reference import reference_model

__all__ = ["DPOTrainer", "GRPOTrainer"]
SYNCHRONIZED = "`sync_ref_model` must be False because the reference is the base without a prompt, which never changes"


class DPOTrainer(trl.DPOTrainer):
    """TRL's ``DPOTrainer``. Without ``ref_model`` a :class:`SoftPromptModel` is compared with its base.

    Args:
        model, ref_model, args, options: as for TRL's class.
    """

    def __init__(self, model: Any, ref_model: Any = None, args: Any = None, **options: Any) -> None:
        if isinstance(model, SoftPromptModel) and ref_model is None:
            if getattr(args, "sync_ref_model", False):
                raise ValueError(SYNCHRONIZED)
            ref_model = reference_model(model)
        super().__init__(model, ref_model, args, **options)


class GRPOTrainer(trl.GRPOTrainer):
    """TRL's ``GRPOTrainer``. With ``beta`` a :class:`SoftPromptModel` is compared with its base, or ``ref_model``.

    Args:
        ref_model: what :func:`reference_model` returned; None: the base without a prompt.
        model, reward_funcs, args, options: as for TRL's class.
    """

    def __init__(
        self, model: Any, reward_funcs: Any, args: Any = None, *, ref_model: Any = None, **options: Any
    ) -> None:
        if isinstance(model, SoftPromptModel) and getattr(args, "use_vllm", False):
            raise ValueError("`use_vllm` must be False because vLLM would generate without the prompt")
        if not isinstance(model, SoftPromptModel) or not getattr(args, "beta", 0.0):
            if ref_model is not None:
                raise ValueError("`ref_model` cannot be given without a SoftPromptModel and `beta`")
            super().__init__(model, reward_funcs, args, **options)
            return
        if args.sync_ref_model:
            raise ValueError(SYNCHRONIZED)
        beta, args.beta = args.beta, 0.0  # TRL then loads no reference
        try:
            super().__init__(model, reward_funcs, args, **options)
        finally:
            args.beta = beta
        self.beta = beta
        self.ref_model = (reference_model(model) if ref_model is None else ref_model).eval()
        trl.trainer.utils.add_fused_lm_head(
            self.ref_model, temperature=self.temperature, cast_lm_head_to_fp32=args.cast_lm_head_to_fp32
        )
