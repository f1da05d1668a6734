"""Prompts as keys and values: computed once, stored, and read by later batches."""
