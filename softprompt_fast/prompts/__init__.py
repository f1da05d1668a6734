"""Trainable soft prompts: the bank, initial values, reparameterisations, files on disk."""
