"""Conversations as text, by the chat template of a model's tokenizer."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from typing import Any

Messages = Sequence[Mapping[str, str]]
"""Turns, each with ``role`` and ``content``."""
CHAT_COLUMNS = ("messages", "conversations")
SPECIAL_TOKENS = ("bos_token", "eos_token", "unk_token", "pad_token")


def question(messages: Messages, chat: Mapping[str, str]) -> str:
    """The conversation up to its last answer, with the beginning of the answer that follows.

    Args:
        chat: ``chat_template``, and the special tokens that it names.
    """
    from jinja2 import TemplateError
    from transformers.utils.chat_template_utils import render_jinja_template

    if "chat_template" not in chat:
        raise ValueError("conversations need the chat template of a tokenizer; call `task.read_chat(tokenizer)`")
    before: list[Any] = list(messages)
    while before and before[-1]["role"] == "assistant":
        before.pop()
    if not before:
        raise ValueError("a conversation must have a turn before the answer, got none")
    given: dict[str, Any] = dict(chat)
    try:
        rendered: Any = render_jinja_template([[*before]], add_generation_prompt=True, **given)
    except TemplateError as error:
        raise ValueError(f"the model's chat template refuses the conversation: {error}") from error
    text: str = rendered[0][0]
    return text


def answer(messages: Messages, column: str) -> str:
    """The last answer of a conversation."""
    if messages[-1]["role"] != "assistant":
        raise ValueError(f"column {column!r} must end with an answer of the assistant, got {messages[-1]['role']!r}")
    return messages[-1]["content"]


def chat_of(tokenizer: Any) -> dict[str, str]:
    """What renders conversations as a tokenizer does: its chat template, and its special tokens.

    Raises:
        ValueError: the tokenizer has no chat template.
    """
    template = getattr(tokenizer, "chat_template", None)
    if not isinstance(template, str):
        raise ValueError("conversations need a model whose tokenizer has a chat template, and this one has none")
    tokens = {name: getattr(tokenizer, name, None) for name in SPECIAL_TOKENS}
    return {"chat_template": template} | {name: str(value) for name, value in tokens.items() if value is not None}


def holds_conversations(values: Iterable[Any]) -> bool:
    """Whether the first value of a column that is there is a conversation."""
    from .values import is_missing, messages_of

    first = next((value for value in values if not is_missing(value)), None)
    return messages_of(first) is not None
