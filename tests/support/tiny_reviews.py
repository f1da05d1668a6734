"""A tiny task that a tiny model can learn: a tokenizer, labelled texts, and the command line run in this process."""

from __future__ import annotations

from typing import Any

from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from typer.testing import CliRunner

from softprompt_fast.cli.app import app

GOOD, BAD = ["fine", "great", "lovely"], ["dull", "awful", "poor"]
WORDS = ["<pad>", "<s>", "</s>", "<unk>", *GOOD, *BAD, "film", "plot", "Label", ":", "yes", "no", "very"]


def tiny_tokenizer(*more: str) -> PreTrainedTokenizerFast:
    """One token per word; `more` words than the usual ones."""
    tokenizer = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*WORDS, *more])}, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    return PreTrainedTokenizerFast(
        tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


def reviews(count: int = 64) -> list[dict[str, Any]]:
    """Texts whose one telling word decides the label; lengths differ."""
    rows = []
    for i in range(count):
        word = (GOOD if i % 2 else BAD)[i // 2 % 3]
        rows.append({"text": f"film plot {'very ' * (i % 4)}{word}", "label": "yes" if i % 2 else "no"})
    return rows


def run(*arguments: str) -> Any:
    result = CliRunner().invoke(app, list(arguments), catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return result
