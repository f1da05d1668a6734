"""The text that is compressed, as token ids, and how a query follows it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..tasks.chat import chat_of, question
from ..tasks.encoding import checked, plain_text_ids, token_ids
from ..tasks.templates import parse

TEXT_MARK, QUERY_MARK = "\ue000", "\ue001"
"""Characters of no text, in place of the text and of the query in a chat template."""


@dataclass(frozen=True)
class SourceText:
    """What is in front of every query."""

    ids: list[int]
    """[T], with the BOS token if the tokenizer adds one; in a chat, if the chat template writes one."""
    frame: int
    """Number of the first ids that an empty text would have too: BOS, and the opening of a chat."""
    template: str
    """The query as it follows the text; a chat's turns are part of it."""
    between: str = ""
    """Chat: between the text and a user's words."""
    after: str = ""
    """Chat: after a user's words."""

    @property
    def is_chat(self) -> bool:
        return bool(self.after)

    def __len__(self) -> int:
        return len(self.ids)

    def in_chat(self, tokenizer: Any) -> SourceText:
        """The text as a system prompt.

        Raises:
            ValueError: the tokenizer has no chat template, or none with a place for it.
        """
        before, between, after = _chat_parts(tokenizer)
        if not after:
            raise ValueError("the model's chat template must begin an answer after the user's words")
        opening = token_ids(tokenizer, before) if before else self.ids[: self.frame]
        return SourceText(opening + self.ids[self.frame :], len(opening), self.template, between, after)

    def asking(self, tokenizer: Any, words: str, opening: str = "") -> list[int]:
        """Token ids with which a user asks for something after the text, and those of the answer's first words."""
        asked = f"{self.between}{words}{self.after}" if self.is_chat else f"\n\n{words}\n"
        return token_ids(tokenizer, asked) + (token_ids(tokenizer, opening) if opening else [])


def read_source(tokenizer: Any, text: str, template: str, *, chat: bool) -> SourceText:
    """The text as the model reads it.

    Args:
        template: of a query; in a chat, of the user's turn.
        chat: whether the text is a system prompt, put into the tokenizer's chat template.

    Raises:
        ValueError: an empty text, one that is not valid Unicode, or a chat template without a place for it.
    """
    if not isinstance(text, str) or not text.strip():
        raise ValueError(f"the text must hold words, got {text!r}")
    checked(text)
    if not chat:
        ids = plain_text_ids(tokenizer, text, end=False)
        bos = getattr(tokenizer, "bos_token_id", None)
        return SourceText(ids, int(bos is not None and ids[:1] == [bos]), template)
    before, between, after = _chat_parts(tokenizer)
    ids = token_ids(tokenizer, before + text)  # as apply_chat_template: the template writes all special tokens
    opening = token_ids(tokenizer, before) if before else []
    frame = next((i for i, (a, b) in enumerate(zip(opening, ids, strict=False)) if a != b), min(len(opening), len(ids)))
    return SourceText(ids, frame, _escaped(between) + template + _escaped(after), between, after)


def words_before(template: str) -> str:
    """The template's own words before its first column."""
    return parse(template)[0][0]


def words_after(template: str) -> str:
    """The template's own words after its last column."""
    return parse(template)[-1][0]


def _chat_parts(tokenizer: Any) -> tuple[str, str, str]:
    """A chat's text before a system prompt, between it and the user's words, and after these."""
    messages = [{"role": "system", "content": TEXT_MARK}, {"role": "user", "content": QUERY_MARK}]
    rendered = question(messages, chat_of(tokenizer))
    if rendered.count(TEXT_MARK) != 1 or rendered.count(QUERY_MARK) != 1:
        raise ValueError("the model's chat template must show a system prompt once; compress the text without a chat")
    before, _, rest = rendered.partition(TEXT_MARK)
    between, found, after = rest.partition(QUERY_MARK)
    if not found:
        raise ValueError(
            "the model's chat template must show a system prompt before the user's words; "
            "compress the text without a chat"
        )
    return before, between, after


def _escaped(text: str) -> str:
    return text.replace("{", "{{").replace("}", "}}")
