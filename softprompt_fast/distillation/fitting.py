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
BIAS_RIDGE = 1e-2
"""Weight of the distance of exp(bias) from 1, relative to the same."""
DIRECTION_RIDGE = 1e-3
"""Weight of the length of the query vectors' common direction, relative to the same."""
BIAS_UPDATES = 100
"""Updates that find the biases."""
LEAST_WEIGHT = 0.05
"""Smallest exp(bias)."""


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

    Attention matching (arXiv 2602.16284). In every layer and key-value head:

    1. N keys of the text are chosen: the first one, which many models attend to from everywhere, and those with the
       largest root mean square of the attention from the rows' tokens. So a key that few tokens need, but need much, is
       among them.
    2. Each gets a bias, with which the kept keys together draw as much attention as the whole text.
    3. The values are the least-squares solution under which the rows' attention gives what it gives with the whole
       text. A ridge draws them to the text's own values.

    Differences from the paper: attention here has no bias of a key, so the key itself is moved along the direction
    that all query vectors of its head have in common. (With SmolLM2-135M the squared error of the bias is 0.06 % in the
    median head, and 2.5 % in the worst one.) And the values are fitted to the whole attention, over the text and the
    row's own tokens, and not to the text's part alone.

    A model with relative positions gets the kept keys at their distance before the row's first token. Other models get
    them at their places in the text.

    Args:
        text_ids: [T], T >= N
        rows: at least one; token ids [U] of texts that follow the text: queries with the teacher's continuations.
        keep_first: the first position keeps the text's key and value.

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
        exact = torch.float32 if key.device.type == "mps" else torch.float64  # which Apple's GPUs do not have
        places = self._places(seen, key)
        index = places[..., None].expand(-1, -1, key.shape[-1])
        kept_key, kept_value = key.gather(1, index), value.gather(1, index)
        bias = _Bias(kept_key, seen.scale, exact)
        wanted = []
        for query, own_key, own_value in self._rows_of(seen):
            scores = _scores(query, key, own_key, seen)
            total = scores.logsumexp(-1, keepdim=True)
            whole = (scores - total).exp()
            kept = (_scores(query, kept_key, own_key, seen)[..., : self.count] - total).exp()
            bias.add(query, kept, whole[..., : key.shape[1]].sum(-1, keepdim=True))
            wanted.append(whole @ _joined(value, own_value))
        kept_key += bias.shift(int(self.keep_first)).to(kept_key.dtype)
        size = self.count - self.keep_first
        gram = key.new_zeros(len(key), size, size, dtype=exact)
        right = key.new_zeros(len(key), size, value.shape[-1], dtype=exact)
        for (query, own_key, own_value), output in zip(self._rows_of(seen), wanted, strict=True):
            kept = _scores(query, kept_key, own_key, seen).softmax(-1)
            # What the kept keys' values have to add to the text's own ones.
            missing = output - kept @ _joined(kept_value, own_value)
            free = kept[..., int(self.keep_first) : self.count].flatten(1, 2).to(exact)
            gram += free.mT @ free
            right += free.mT @ missing.flatten(1, 2).to(exact)
        kept_value[:, int(self.keep_first) :] += _ridge_solution(gram, right, RIDGE).to(kept_value.dtype)
        self.result[seen.layer] = torch.stack([kept_key, kept_value]).transpose(1, 2).to(self.result.dtype)

    def _places(self, seen: ObservedAttention, key: Tensor) -> Tensor:
        """[H', N] in ascending order: the text's first place, and those with the largest sum of squared attention."""
        squares = key.new_zeros(key.shape[:2])
        for query, own_key, _ in self._rows_of(seen):
            weights = _scores(query, key, own_key, seen).softmax(-1)
            squares += weights[..., : key.shape[1]].square().sum((1, 2))
        squares[:, 0] = torch.inf
        return squares.topk(self.count, -1).indices.sort(-1).values

    def _rows_of(self, seen: ObservedAttention) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        """Each row's queries [H', H / H', U, E], keys and values [H', U, E], in float32."""
        heads = seen.key.shape[1]
        for start, end in self.rows:
            query, key, value = (x[start:end].transpose(0, 1).float() for x in (seen.query, seen.key, seen.value))
            yield query.unflatten(0, (heads, -1)), key, value


class _Bias:
    """Biases of kept keys, summed up over the rows as normal equations.

    Args:
        kept_key: [H', N, E]
        scale: of the attention.
    """

    def __init__(self, kept_key: Tensor, scale: float, dtype: torch.dtype) -> None:
        heads, count, size = kept_key.shape
        self.scale = scale
        self.gram = kept_key.new_zeros(heads, count, count, dtype=dtype)
        self.right = kept_key.new_zeros(heads, count, 1, dtype=dtype)
        self.query_gram = kept_key.new_zeros(heads, size, size, dtype=dtype)
        self.query_right = kept_key.new_zeros(heads, size, 1, dtype=dtype)

    def add(self, query: Tensor, kept: Tensor, drawn: Tensor) -> None:
        """Adds the tokens of a row. The more a token attends to the text, the more it counts.

        Args:
            query: [H', G, U, E]
            kept: [H', G, U, N], exponentials of the scores of the kept keys, relative to those of all keys.
            drawn: [H', G, U, 1], the share of attention that the whole text draws.
        """
        query, kept, drawn = (x.flatten(1, 2).to(self.gram.dtype) for x in (query, kept, drawn))
        self.gram += kept.mT @ kept
        self.right += kept.mT @ drawn
        counted = self.scale * drawn * query
        self.query_gram += counted.mT @ counted
        self.query_right += counted.mT @ drawn

    def shift(self, fixed: int) -> Tensor:
        """What is added to the keys [H', N, E]; nothing to the first `fixed` ones."""
        added = _ridge(self.gram, BIAS_RIDGE)
        weights = torch.ones_like(self.right)
        for _ in range(BIAS_UPDATES):  # non-negative least squares, by multiplication (Lee and Seung 2001)
            update = (self.right + added) / (self.gram @ weights + added * weights)
            weights[:, fixed:] *= update[:, fixed:]
        bias = weights.clamp(min=LEAST_WEIGHT).log()
        direction = _ridge_solution(self.query_gram, self.query_right, DIRECTION_RIDGE)
        return bias @ direction.mT


def _joined(first: Tensor, own: Tensor) -> Tensor:
    return torch.cat([first, own], 1)[:, None]


def _scores(query: Tensor, first: Tensor, own: Tensor, seen: ObservedAttention) -> Tensor:
    """[H', G, U, F + U], scores of a row's queries [H', G, U, E] with keys [H', F, E] before it, then with its own."""
    scores = query @ _joined(first, own).transpose(-1, -2) * seen.scale
    count, own_count = first.shape[1], own.shape[1]
    later = torch.ones(own_count, own_count, dtype=torch.bool, device=scores.device).triu(1)
    scores[..., count:].masked_fill_(later, -torch.inf)
    if seen.window:
        at = torch.arange(count, count + own_count, device=scores.device)
        distance = at[:, None] - torch.arange(count + own_count, device=scores.device)
        scores.masked_fill_(distance >= seen.window, -torch.inf)
    return scores


def _ridge_solution(gram: Tensor, right: Tensor, weight: float) -> Tensor:
    """The solution [H', N, E] of normal equations [H', N, N] and [H', N, E], with a ridge relative to the diagonal."""
    added = torch.diag_embed(_ridge(gram, weight)[..., 0].expand(gram.shape[:2]))
    return torch.cholesky_solve(right, torch.linalg.cholesky(gram + added))


def _ridge(gram: Tensor, weight: float) -> Tensor:
    """[H', 1, 1], above 0 also where no row sees the text."""
    mean = gram.diagonal(dim1=1, dim2=2).mean(-1)
    return (weight * mean).clamp(min=torch.finfo(torch.float32).tiny)[:, None, None]
