"""Serving prompts: a bank of compiled prompts, and a pipeline that answers any mix of them in one batch."""

from .bank import PromptBank
from .pipeline import SoftPromptPipeline

__all__ = ["PromptBank", "SoftPromptPipeline"]
