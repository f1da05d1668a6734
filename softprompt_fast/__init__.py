"""Soft prompts for frozen language models: joined in one fused pass, tuned and served without waste."""

from .base.version import __version__
from .models.deep_prompt_model import DeepPromptModel
from .models.soft_prompt_model import SoftPromptModel
from .ops.assemble.batch import PackedRows, PromptedBatch
from .ops.assemble.functional import assemble
from .prompts.fast_soft_prompt import FastSoftPrompt
from .prompts.initialization import initial_prompt

__all__ = [
    "DeepPromptModel",
    "FastSoftPrompt",
    "PackedRows",
    "PromptedBatch",
    "SoftPromptModel",
    "__version__",
    "assemble",
    "initial_prompt",
]
