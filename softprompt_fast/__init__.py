"""Soft prompts for frozen language models: joined in one fused pass, tuned and served without waste."""

from .batch import PackedRows, PromptedBatch
from .deep_prompt import DeepPromptModel
from .functional import assemble
from .initialize import initial_prompt
from .model import SoftPromptModel
from .prompt import FastSoftPrompt

__version__ = "0.1.0"
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
