"""A frozen transformers model with soft prompts in front of it."""

from .deep_prompt_model import DeepPromptModel
from .soft_prompt_model import SoftPromptModel

__all__ = [
    "DeepPromptModel",
    "SoftPromptModel",
]
