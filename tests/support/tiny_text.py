"""A text to compress, queries after it, and the model that reads both without this package."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import Tensor

from softprompt_fast.distillation.result import Compression
from softprompt_fast.distillation.run import compress
from support.tiny_models import build
from support.tiny_reviews import BAD, GOOD, tiny_tokenizer

TEXT = "film great plot Label : yes very dull film Label : no " * 3
TEMPLATE = "{text} Label :"
TURNS = ("system_turn", "user_turn", "assistant_turn")
CHAT_TEMPLATE = (
    "{% for m in messages %}{{ m['role'] }}_turn {{ m['content'] }} </s> {% endfor %}"
    "{% if add_generation_prompt %}assistant_turn{% endif %}"
)


def queries(count: int = 24) -> list[dict[str, Any]]:
    """Different texts of different lengths, without labels."""
    words = [*GOOD, *BAD]
    return [
        {"text": " ".join(["film", *["very"] * (i % 3), words[i % 6], *["plot"] * (i // 6 % 5)])} for i in range(count)
    ]


def chat_tokenizer() -> Any:
    tokenizer = tiny_tokenizer(*TURNS)
    tokenizer.chat_template = CHAT_TEMPLATE
    return tokenizer


def compressed(output: Path, **options: Any) -> Compression:
    """A compression of :data:`TEXT` in a few steps."""
    model = options.pop("model", None) or build("llama")
    given: dict[str, Any] = {
        "tokens": 4,
        "template": TEMPLATE,
        "steps": 12,
        "batch_size": 8,
        "new_tokens": 5,
        "learning_rate": 0.05,
        "cache": output / "cache",
        "console": Console(quiet=True),
    }
    tokenizer = options.pop("tokenizer", None) or tiny_tokenizer()
    text, rows = options.pop("text", TEXT), options.pop("queries", queries())
    return compress(model, tokenizer, text, output, rows, **given | options)


@torch.no_grad()
def logits_after_text(model: Any, text: list[int], query: list[int], continuation: list[int]) -> Tensor:
    """[N, V], the plain model's logits at the places of a continuation: text, query and continuation as ids, alone."""
    ids = torch.tensor([text + query + continuation])
    logits: Tensor = model(ids, use_cache=False).logits[0, len(text) + len(query) - 1 : -1]
    return logits
