"""How a bank names its parameters."""

PARAMETER_PREFIX = "prompt_"
"""Begins the name of each prompt's parameter, so that no prompt can hide an attribute of the module."""
