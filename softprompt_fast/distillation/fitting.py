"""Keys and values that are fitted to the model's attention to a text: attention matching (arXiv 2602.16284)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from ..base.errors import Unsupported
from ..compiled.compile import compile_prompts, flattened, pack_texts
from ..hf.embedding import embedding_table
from ..models.deep_prompt_model import DeepPromptModel
from ..packed.attention import ObservedAttention
from .initial_values import first_before

RIDGE = 1e-4
"""Weight of the values' distance from the text's own values, relative to the mean diagonal of the normal equations."""


@torch.no_grad()
def fitted_values(
    student: DeepPromptModel,
    text_ids: Sequence[int],
    count: int,
    rows: Sequence[Sequence[int]],
    *,
    keep_first: bool = False,
) -> Tensor:
    """Keys and values [N, W] of `count` positions, fitted in closed form to the attention of some rows to a text.

    Attention matching (arXiv 2602.16284). In every layer and key-value head, N keys of the text
    are chosen: the first one, which many models attend to from everywhere, and those with the largest root mean square
    of the attention from the rows' tokens. So a key that few tokens need, but need much, is among them. The values are
    then the least-squares solution under which the rows' attention gives what it gives with the whole text.

    Differences from the paper: it adds a bias to each kept key, which attention here does not have. Instead the fit is
    of the whole attention, over the text and the row's own tokens, and not of the text's part alone. So the values also
    make up for the attention that the kept keys lack. The ridge draws the values to the text's own ones.

    A model with relative positions gets the kept keys at their distance before the row's first token. Other models get
    them at their places in the text.

    Args:
        text_ids: [T], T >= N
        rows: at least one; token ids [U] of texts that follow the text: queries with the teacher's continuations.
        keep_first: the first position keeps the text's value.

    Raises:
        Unsupported: the model's attention is not a plain softmax.
    """
    runner = student.runner
    table = embedding_table(student.get_input_embeddings())
    vectors = table(torch.tensor(list(text_ids), device=table.weight.device)).float()
    moved = count - len(vectors)
    text = compile_prompts(runner, [vectors], first_before(runner, vectors, count))
    batch = pack_texts(runner.model, rows, [(0, len(vectors))] * len(rows), text)
    batch = replace(batch, position_ids=batch.position_ids + moved)  # where rows begin after N positions
    fit = _Fit(text, count, [len(row) for row in rows], keep_first)
    batch.layout.observer = fit.layer
    runner.run(batch, batch.position_ids.new_zeros(1), {})
    return flattened(fit.result).float()


def check_fitting(student: DeepPromptModel) -> None:
    """Raises TypeError if no values can be fitted to the attention of a model."""
    try:
        fitted_values(student, [0, 0], 1, [[0]])
    except Unsupported as error:
        name = type(student.base_model).__name__
        raise TypeError(f"`init` fitted cannot be used with {name}: {error}") from error


class _Fit:
    """Fits one layer after the other while the model runs rows after the whole text.

    Args:
        text: [L, 2, T, H', E], its keys and values.
        lengths: of the rows.
    """

    def __init__(self, text: Tensor, count: int, lengths: Sequence[int], keep_first: bool) -> None:
        self.text, self.count, self.keep_first = text, count, keep_first
        self.rows = list(pairwise(accumulate(lengths, initial=0)))
        self.result = text[:, :, :count].clone()

    def layer(self, seen: ObservedAttention) -> None:
        if not seen.plain:
            raise Unsupported("its attention has soft caps or sinks, to which no values are fitted")
        assert seen.layer is not None  # the layout has checked it
        key, value = self.text[seen.layer].transpose(1, 2).float()
        places = self._places(seen, key)
        index = places[..., None].expand(-1, -1, key.shape[-1])
        kept_key, kept_value = key.gather(1, index), value.gather(1, index)
        size = self.count - self.keep_first
        exact = torch.float32 if key.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
        gram = key.new_zeros(len(key), size, size, dtype=exact)
        right = key.new_zeros(len(key), size, key.shape[-1], dtype=exact)
        for query, own_key, own_value in self._rows_of(seen):
            whole = _weights(query, key, own_key, seen)
            kept = _weights(query, kept_key, own_key, seen)
            # What the kept keys' values have to add to the text's own ones.
            missing = whole @ _joined(value, own_value) - kept @ _joined(kept_value, own_value)
            free = kept[..., int(self.keep_first) : self.count].flatten(1, 2).to(exact)
            gram += free.transpose(1, 2) @ free
            right += free.transpose(1, 2) @ missing.flatten(1, 2).to(exact)
        kept_value[:, int(self.keep_first) :] += _ridge_solution(gram, right).to(kept_value.dtype)
        self.result[seen.layer] = torch.stack([kept_key, kept_value]).transpose(1, 2).to(self.result.dtype)

    def _places(self, seen: ObservedAttention, key: Tensor) -> Tensor:
        """[H', N] in ascending order: the text's first place, and those with the largest sum of squared attention."""
        squares = key.new_zeros(key.shape[:2])
        for query, own_key, _ in self._rows_of(seen):
            squares += _weights(query, key, own_key, seen)[..., : key.shape[1]].square().sum((1, 2))
        squares[:, 0] = torch.inf
        return squares.topk(self.count, -1).indices.sort(-1).values

    def _rows_of(self, seen: ObservedAttention) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each row's queries [H', H / H', U, E], keys and values [H', U, E], in float32."""
        heads = seen.key.shape[1]
        for start, end in self.rows:
            query, key, value = (x[start:end].transpose(0, 1).float() for x in (seen.query, seen.key, seen.value))
            yield query.unflatten(0, (heads, -1)), key, value


def _joined(first: Tensor, own: Tensor) -> Tensor:
    return torch.cat([first, own], 1)[:, None]


def _weights(query: Tensor, first: Tensor, own: Tensor, seen: ObservedAttention) -> Tensor:
    """[H', G, U, F + U], attention of a row's queries [H', G, U, E] to keys [H', F, E] before it, then to its own."""
    scores = query @ _joined(first, own).transpose(-1, -2) * seen.scale
    at = torch.arange(first.shape[1], scores.shape[-1], device=scores.device)
    distance = at[:, None] - torch.arange(scores.shape[-1], device=scores.device)
    hidden = distance < 0
    if seen.window:
        hidden |= distance >= seen.window
    return scores.masked_fill(hidden, -torch.inf).softmax(-1)


def _ridge_solution(gram: Tensor, right: Tensor) -> Tensor:
    """The solution [H', N, E] of normal equations [H', N, N] and [H', N, E] with a ridge."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(-1)
    ridge = (RIDGE * mean).clamp(min=torch.finfo(torch.float32).tiny)  # 0 if no row sees the text
    factor = torch.linalg.cholesky(gram + torch.diag_embed(ridge[:, None].expand(gram.shape[:2])))
    return torch.cholesky_solve(right, factor)
