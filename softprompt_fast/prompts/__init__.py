"""Trainable soft prompts: the bank, initial values, reparameterisations, files on disk."""

from .fast_soft_prompt import FastSoftPrompt
from .initialization import initial_prompt
from .peft_files import read_prompt, write_prompt
from .placement import FixedFirst, bos_vector
from .reparameterization import LowRank, NormBound, Offset, PromptDropout, ResidualMLP, SharedPart, fold, reparameterize

__all__ = [
    "FastSoftPrompt",
    "FixedFirst",
    "LowRank",
    "NormBound",
    "Offset",
    "PromptDropout",
    "ResidualMLP",
    "SharedPart",
    "bos_vector",
    "fold",
    "initial_prompt",
    "read_prompt",
    "reparameterize",
    "write_prompt",
]
