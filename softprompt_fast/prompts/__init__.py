"""Trainable soft prompts: the bank, initial values, reparameterisations, files on disk."""

from .card import write_card
from .fast_soft_prompt import FastSoftPrompt
from .hub_upload import push_to_hub
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
    "push_to_hub",
    "read_prompt",
    "reparameterize",
    "write_card",
    "write_prompt",
]
