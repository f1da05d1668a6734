"""The words of labels as a tree of tokens, whose branches are the decisions by which a model chooses a label.

At a branch only the tokens that continue some label are compared, as in constrained decoding. The log-probability of a
label is the sum over its branches. Tokens that all labels share, and tokens that follow without a choice, count for
nothing. So labels of few and of many tokens have the same chance, and tuning learns nothing but the choice.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

Prefix = tuple[int, ...]
"""The first tokens of a word."""


class LabelTree:
    """The branches of some labels' words.

    A word that begins another one has no branch after its end, so the longer word cannot win against it; words that
    need one have an end token (see ``with_ends``).

    Args:
        words: token ids of each of C labels' words.
    """

    def __init__(self, words: Sequence[Sequence[int]]) -> None:
        self.words = [list(word) for word in words]
        following: dict[Prefix, list[int]] = {}
        for word in self.words:
            for step, token in enumerate(word):
                tokens = following.setdefault(tuple(word[:step]), [])
                if token not in tokens:
                    tokens.append(token)
        self.branches = {prefix: tokens for prefix, tokens in following.items() if len(tokens) > 1}
        """Where at least two tokens may follow, and these, in the order of the labels."""
        ordered = sorted(self.branches, key=len, reverse=True)
        self.paths: list[Prefix] = []
        """What a model reads after a text to see all branches: the longest prefixes. Usually one, and often empty."""
        for prefix in ordered:
            if not any(path[: len(prefix)] == prefix for path in self.paths):
                self.paths.append(prefix)
        self._read_on: dict[Prefix, list[Prefix]] = {path: [] for path in self.paths}
        for prefix in self.branches:
            self._read_on[next(path for path in self.paths if path[: len(prefix)] == prefix)].append(prefix)

    def branches_on(self, path: Prefix) -> list[Prefix]:
        """The branches that are read on a path; each is read on the first path that it begins."""
        return self._read_on[path]

    def scores(self, values: dict[Prefix, Tensor], rows: int) -> Tensor:
        """[rows, C], the log-probability of each label, up to a constant of each row.

        Args:
            values: of each branch [rows, its tokens], logits or log-probabilities.
        """
        total = torch.zeros(rows, len(self.words), dtype=torch.float64)
        for prefix, tokens in self.branches.items():
            # The constant of a single branch is left to the caller, which normalises once.
            each = values[prefix].log_softmax(-1) if len(self.branches) > 1 else values[prefix]
            for label, word in enumerate(self.words):
                if len(word) > len(prefix) and tuple(word[: len(prefix)]) == prefix:
                    total[:, label] += each[:, tokens.index(word[len(prefix)])]
        return total
