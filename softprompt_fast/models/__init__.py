"""A frozen transformers model with soft prompts in front of it."""
