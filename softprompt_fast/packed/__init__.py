"""Shared-prompt execution: a batch as one sequence without padding."""
