"""The op that joins prompts and token embeddings."""
