"""A prompt after the beginning-of-sequence token: ``[BOS][prompt][text]`` instead of ``[prompt][BOS][text]``.

The prompt's first vector is BOS's embedding and is not trained; texts are tokenised without special tokens
(``Task.special_tokens = False``). Everything else sees an ordinary prompt of P + 1 vectors.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from ..hf.embedding import embedding_table


class FixedFirst(nn.Module):
    """A parametrization (``torch.nn.utils.parametrize``) that keeps a prompt's first vector as it is.

    ::

        bos = bos_vector(model, tokenizer)
        tuned.add_prompt("movies", init=torch.cat([bos[None], values]))  # [P + 1, D]
        parametrize.register_parametrization(tuned.prompts, "prompt_movies", FixedFirst(bos))

    Args:
        vector: [D]
    """

    def __init__(self, vector: Tensor) -> None:
        super().__init__()
        if vector.dim() != 1:
            raise ValueError(f"`vector` must have shape [D], got {list(vector.shape)}")
        self.vector: Tensor
        self.register_buffer("vector", vector.detach().clone())

    def forward(self, prompt: Tensor) -> Tensor:
        """[P + 1, D] -> the same, its first row replaced; the gradient of that row is zero."""
        return torch.cat([self.vector.to(prompt)[None], prompt[1:]])

    def right_inverse(self, prompt: Tensor) -> Tensor:
        return prompt


def bos_vector(model: Any, tokenizer: Any) -> Tensor:
    """[D] float32, the vector that the model sees for the beginning-of-sequence token, its scale included.

    Args:
        model: a transformers model, or a :class:`SoftPromptModel`.

    Raises:
        ValueError: the tokenizer has no such token.
    """
    token = getattr(tokenizer, "bos_token_id", None)
    if token is None:
        raise ValueError(
            f"`tokenizer` must have a beginning-of-sequence token, but {type(tokenizer).__name__} has none"
        )
    table = embedding_table(model.get_input_embeddings())
    return table(torch.tensor(token, device=table.weight.device)).detach().float()
