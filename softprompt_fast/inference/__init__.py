"""Serves prompts: a bank of compiled prompts, and a pipeline that answers any mix of them in one batch."""

from .pipeline import SoftPromptPipeline
from .prompt_bank import PromptBank

__all__ = [
    "PromptBank",
    "SoftPromptPipeline",
]
