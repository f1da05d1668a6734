"""How much of a text another one repeats: ROUGE-L."""

from __future__ import annotations

import re

WORD = re.compile(r"\w+")


def rouge_l(reference: str, text: str) -> float:
    """ROUGE-L F1: the longest common subsequence of words, 0 to 1.

    Lin (2004), "ROUGE: A Package for Automatic Evaluation of Summaries", section 3, with equal weights of recall and
    precision. Case and punctuation do not count. Without spaces between words, as in Chinese, a sentence is one word.
    Equal texts have 1, also if they hold no words.
    """
    if reference == text:
        return 1.0
    one, other = WORD.findall(reference.lower()), WORD.findall(text.lower())
    # Of the common subsequences of the words of `one` so far and each start of `other`.
    lengths = [0] * (len(other) + 1)
    for word in one:
        diagonal = 0
        for j, candidate in enumerate(other, start=1):
            above = lengths[j]
            lengths[j] = diagonal + 1 if word == candidate else max(above, lengths[j - 1])
            diagonal = above
    return 2 * lengths[-1] / (len(one) + len(other)) if lengths[-1] else 0.0
