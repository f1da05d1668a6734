"""Rows of data as token ids: the ids that text, words and responses have in running text.

A decoder reads a text and its answer as one text. So an answer is tokenised together with the text before it, and the
ids after the text's own are used. Spaces at the end of a template belong to the answer, because tokenizers join a space
to the word after it. ``Task.encoding`` 1, of prompts tuned before this rule, tokenises answers alone.
"""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from typing import Any

from . import templates
from .cuts import counting_cuts, current_cuts
from .examples import Examples, lacks
from .task import Task
from .words import begins_another, same_tokens

logger = logging.getLogger("softprompt_fast")

IGNORED = -100
"""The label of a token that no loss counts; transformers and PyTorch use the same number."""
CHECKED_ROWS = 200
"""Rows on which the tokens of label words are compared with running text."""
CONTEXTS = (":", "\n")
"""Texts that a word is tokenised after where it joins the text before it; the first that it does not join is used."""
MARK = "\ue000"
"""A character of no text, in place of a template's columns."""


def token_ids(tokenizer: Any, text: str) -> list[int]:
    """Token ids of a text alone, without special tokens."""
    return list(tokenizer(text, add_special_tokens=False).input_ids)


def without_end(ids: Sequence[int], tokenizer: Any) -> list[int]:
    """Token ids without an end-of-sequence token at their end: the answer follows there."""
    ids = list(ids)
    return ids[:-1] if ids and ids[-1] == tokenizer.eos_token_id else ids


def checked(text: str) -> str:
    """The text, if a tokenizer can read it.

    Raises:
        ValueError: it holds half of a surrogate pair.
    """
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            f"the text must be valid Unicode, got half of a surrogate pair ({text[error.start]!a}) at character "
            f"{error.start}"
        ) from None
    return text


def continuation_ids(tokenizer: Any, word: str, before: Sequence[str]) -> list[int]:
    """Token ids of a word as it follows a text.

    Args:
        before: texts to tokenise it after, the best first. If the word's first token joins each of them and
            :data:`CONTEXTS`, the ids of the word alone are used.
    """
    for text in (*before, *CONTEXTS):
        start = token_ids(tokenizer, text)
        both = token_ids(tokenizer, text + word)
        if start and len(both) > len(start) and both[: len(start)] == start:
            return both[len(start) :]
    return token_ids(tokenizer, word)


def plain_text_ids(tokenizer: Any, text: str, *, end: bool) -> list[int]:
    """Token ids of a text without a task, with the tokenizer's special tokens.

    Args:
        end: whether an end-of-sequence token that the tokenizer appends stays.
    """
    ids, own = list(tokenizer(checked(text)).input_ids), token_ids(tokenizer, text)
    if not end:  # an end token that the text itself writes stays
        starts = (start for start in range(len(ids) - len(own) + 1) if ids[start : start + len(own)] == own)
        start = next(starts, None)
        if start is None or ids[start + len(own) :] == [tokenizer.eos_token_id]:
            ids = without_end(ids, tokenizer)
    return _one_bos(ids, tokenizer, special_tokens=True)


def encode_text(task: Task, row: Mapping[str, Any], tokenizer: Any, *, encoder_decoder: bool = False) -> list[int]:
    """Token ids of a row's text, at most ``task.max_length``.

    A longer text loses the beginning of its columns, the longest column first. Special tokens and the template's own
    words stay. :func:`~.cuts.counting_cuts` counts such texts. A text for a head is whole: no answer follows it, so
    its last spaces and the tokenizer's end token stay.

    Raises:
        ValueError: the text has no tokens, the template alone has more than ``task.max_length``, or the text is not
            valid Unicode.
    """
    literal = task.literal and not task.special_tokens
    text = checked(task.text(row))
    continued = not encoder_decoder and task.head is None
    if continued:
        text = text[: len(text) - len(moved_space(task))]
    ids = list(tokenizer(text, truncation=False, add_special_tokens=task.special_tokens).input_ids)
    whole = len(ids)
    if task.encoding > 1 and not literal:
        ids = _one_bos(ids, tokenizer, special_tokens=task.special_tokens)
    dropped = whole - len(ids)
    if continued and not literal:
        ids = without_end(ids, tokenizer)
    current_cuts().count_text(len(ids) > task.max_length, task.max_length)
    if len(ids) > task.max_length:
        ids = _cut_columns(task, row, text, ids, tokenizer, dropped)
    if not ids and (literal or tokenizer.eos_token_id is None):
        raise ValueError("the text has no tokens")
    return ids or [tokenizer.eos_token_id]


def encode_targets(
    task: Task, rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, encoder_decoder: bool = False
) -> list[list[int]]:
    """Token ids of what the model should say for each row.

    Responses end with the end-of-sequence token. Label words do so in encoder-decoders, and where the tokens of one
    word begin those of another.

    Raises:
        ValueError: an unknown label, or a tokenizer without the end-of-sequence token that is needed.
    """
    if task.kind == "classification":
        by_word = dict(
            zip(task.label_words.values(), label_words(task, tokenizer, encoder_decoder=encoder_decoder), strict=True)
        )
        ids = [by_word[task.target(row)] for row in rows]
        if encoder_decoder and not all(word[-1:] == [tokenizer.eos_token_id] for word in by_word.values()):
            ids = [[*word, _end(tokenizer)] for word in ids]
        return [word[: task.max_length] for word in ids]
    return [_response_ids(task, row, tokenizer, encoder_decoder) for row in rows]


def encode_target(task: Task, row: Mapping[str, Any], tokenizer: Any, *, encoder_decoder: bool = False) -> list[int]:
    """Token ids of what the model should say for a row; see :func:`encode_targets`."""
    return encode_targets(task, [row], tokenizer, encoder_decoder=encoder_decoder)[0]


def encode(task: Task, rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, encoder_decoder: bool = False) -> Examples:
    """Training features: ``input_ids`` and ``labels``; for decoders, labels are ``IGNORED`` on the text."""
    features: Examples = []
    with counting_cuts():
        targets = encode_targets(task, rows, tokenizer, encoder_decoder=encoder_decoder)
        for row, target in zip(rows, targets, strict=True):
            text = encode_text(task, row, tokenizer, encoder_decoder=encoder_decoder)
            if encoder_decoder:
                features.append({"input_ids": text, "labels": target})
            else:
                features.append({"input_ids": text + target, "labels": [IGNORED] * len(text) + target})
    return features


def moved_space(task: Task) -> str:
    """The spaces at the template's end, which a decoder reads, and generates, with the answer."""
    tail = (_literals(task) or [""])[-1]
    return tail[len(tail.rstrip(" ")) :] if task.encoding > 1 else ""


def word_ids(task: Task, tokenizer: Any, word: str, *, encoder_decoder: bool = False) -> list[int]:
    """Token ids of a label's word after the template's last words, without an end token."""
    if encoder_decoder or task.encoding == 1:
        return token_ids(tokenizer, word)
    space = moved_space(task)
    tail = (_literals(task) or [""])[-1]
    if space:
        word = f" {word.lstrip(' ')}"
    before = tail[: len(tail) - len(space)]
    return continuation_ids(tokenizer, word, [before] if before else [])


def answer_ids(
    task: Task, row: Mapping[str, Any], answer: str, tokenizer: Any, *, encoder_decoder: bool = False
) -> list[int]:
    """Token ids of an answer after a row's text, without an end token."""
    answer = checked(answer)
    if encoder_decoder or task.encoding == 1 or not answer:
        return token_ids(tokenizer, answer)
    text, space = checked(task.text(row)), moved_space(task)
    if space:
        text, answer = text[: len(text) - len(space)], f" {answer.lstrip(' ')}"
    return continuation_ids(tokenizer, answer, [text])


def label_words(task: Task, tokenizer: Any, *, encoder_decoder: bool = False) -> list[list[int]]:
    """Token ids of each label's word; empty for a generation task.

    Where the tokens of one word begin those of another, each word ends with the end-of-sequence token. Otherwise the
    longer one could not win.

    Raises:
        ValueError: an end-of-sequence token is needed, and the tokenizer has none.
    """
    words = [word_ids(task, tokenizer, w, encoder_decoder=encoder_decoder) for w in task.label_words.values()]
    return with_ends(words, tokenizer) if task.encoding > 1 else words


def with_ends(words: list[list[int]], tokenizer: Any) -> list[list[int]]:
    """The words, each with the end-of-sequence token where the tokens of one word begin those of another."""
    return [[*word, _end(tokenizer)] for word in words] if begins_another(words) else words


def check_label_words(
    task: Task, rows: Sequence[Mapping[str, Any]], tokenizer: Any, *, encoder_decoder: bool = False
) -> None:
    """Checks before a run that every label can win, and that label words have the tokens they have in the rows' texts.

    Raises:
        ValueError: a label's word has no tokens, or two labels have the same.
    """
    words = dict(zip(task.labels, label_words(task, tokenizer, encoder_decoder=encoder_decoder), strict=True))
    for label, ids in words.items():
        if not ids or not task.label_words[label].strip():
            raise ValueError(f"the word of each label must have tokens, got {task.label_words[label]!r} for {label!r}")
    for group in same_tokens(words):
        raise ValueError(
            f"the words of labels must have different tokens, got the same for {', '.join(map(repr, group))}; "
            "merge these labels, or give them other words"
        )
    if encoder_decoder or task.encoding == 1 or not words:
        return
    some = [row for row in rows[:CHECKED_ROWS] if lacks(task, row) is None]
    joined = sum(not _follows(task, row, tokenizer, words[task.label(row)]) for row in some)
    if joined:
        logger.warning(
            "the tokens of label words depend on the end of the text in %d of %d rows: all rows use the tokens after "
            "the template's last words; end the template with a fixed word",
            joined,
            len(some),
        )


def _follows(task: Task, row: Mapping[str, Any], tokenizer: Any, word: list[int]) -> bool:
    """Whether a row's text and its label's word, tokenised together, end with the word's ids."""
    space = moved_space(task)
    text, target = task.text(row), task.target(row)
    together = f"{text[: len(text) - len(space)]} {target.lstrip(' ')}" if space else text + target
    word = without_end(word, tokenizer)
    return token_ids(tokenizer, together)[-len(word) :] == word


def _response_ids(task: Task, row: Mapping[str, Any], tokenizer: Any, encoder_decoder: bool) -> list[int]:
    ids = answer_ids(task, row, task.target(row), tokenizer, encoder_decoder=encoder_decoder)
    ids = [*ids, _end(tokenizer)]
    current_cuts().count_response(len(ids) > task.max_length, task.max_length)
    return ids[: task.max_length]


def _end(tokenizer: Any) -> int:
    if tokenizer.eos_token_id is None:
        raise ValueError(
            f"`tokenizer` must have an end-of-sequence token to end answers, got {type(tokenizer).__name__}"
        )
    return int(tokenizer.eos_token_id)


def _one_bos(ids: list[int], tokenizer: Any, *, special_tokens: bool) -> list[int]:
    """The ids with one BOS token; with none if the prompt holds it, that is without special tokens."""
    bos = getattr(tokenizer, "bos_token_id", None)
    if bos is None:
        return ids
    begins = 0
    while begins < len(ids) and ids[begins] == bos:
        begins += 1
    return ids[max(0, begins - special_tokens) :]


def _literals(task: Task) -> list[str] | None:
    """The template's own text before, between and after its columns; None: a column is formatted as a number."""
    try:
        return task.text(dict.fromkeys(task.columns, MARK)).split(MARK)
    except (ValueError, TypeError):
        return None


def _cut_columns(
    task: Task, row: Mapping[str, Any], text: str, ids: list[int], tokenizer: Any, dropped: int
) -> list[int]:
    """The ids of a text without the beginnings of its columns, so that ``task.max_length`` are left.

    Args:
        dropped: tokens that were taken from the front of the tokenizer's ids.
    """
    spans = [] if task.encoding == 1 else _column_tokens(task, row, text, ids, tokenizer, dropped)
    if not spans:
        return ids[-task.max_length :]
    lengths = [end - start for start, end in spans]
    room = task.max_length - (len(ids) - sum(lengths))
    if room < 0:
        raise ValueError(
            f"`max_length` must leave room for the template's own {len(ids) - sum(lengths)} tokens, "
            f"got {task.max_length}"
        )
    left = _shares(lengths, room)
    kept, at = [], 0
    for (start, end), count in zip(spans, left, strict=True):
        kept += [*ids[at:start], *ids[end - count : end]]
        at = end
    return kept + ids[at:]


def _shares(lengths: Sequence[int], room: int) -> list[int]:
    """How many tokens each column keeps: all, or as many as every other long column."""
    shares = [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lambda i: lengths[i])
    for done, i in enumerate(order):
        shares[i] = min(lengths[i], room // (len(order) - done))
        room -= shares[i]
    return shares


def _column_tokens(
    task: Task, row: Mapping[str, Any], text: str, ids: list[int], tokenizer: Any, dropped: int
) -> list[tuple[int, int]]:
    """First token and the token after the last of each column in the ids of a row's text."""
    literals = _literals(task)
    if literals is None:
        return []
    places = []
    at = 0
    names = [name for _, name in templates.parse(task.template) if name is not None]
    for i, name in enumerate(names):
        at += len(literals[i])
        if len(names) == 1:
            end = len(task.text(row)) - len(literals[-1])
        else:
            alone = task.text(dict.fromkeys(names, MARK) | {name: row[name]})
            own = names.count(name)
            end = at + (len(alone) - sum(map(len, literals)) - (len(names) - own) * len(MARK)) // own
        places.append((at, min(end, len(text))))
        at = end
    if getattr(tokenizer, "is_fast", False):
        offsets = tokenizer(
            text, truncation=False, add_special_tokens=task.special_tokens, return_offsets_mapping=True
        ).offset_mapping[dropped:][: len(ids)]
        return [span for start, end in places if (span := _tokens_within(offsets, text, start, end)) is not None]
    bos = len(ids) - len(token_ids(tokenizer, text))
    counts = [[len(token_ids(tokenizer, text[:place].rstrip())) for place in pair] for pair in places]
    return [(max(0, bos) + start, max(0, bos) + end) for start, end in counts]


def _tokens_within(offsets: Sequence[tuple[int, int]], text: str, start: int, end: int) -> tuple[int, int] | None:
    """The range of the tokens of text[start:end]; not those that also hold a template's character, except spaces."""
    inside = [
        i
        for i, (first, last) in enumerate(offsets)
        if max(first, start) < min(last, end) and not text[first:start].strip() and not text[end:last].strip()
    ]
    return (inside[0], inside[-1] + 1) if inside else None
