"""Texts as token ids, and what importing the data packages costs."""

from __future__ import annotations

import subprocess
import sys
from typing import Any

import pytest
import torch
from support.comparison_cases import ANSWERS, LONG_WORDS, TASK
from support.tiny_reviews import tiny_tokenizer

from softprompt_fast.tasks.collation import padded
from softprompt_fast.tasks.encoding import encode_text, label_words, token_ids, without_end
from softprompt_fast.tasks.task import Task


class EndingTokenizer:
    """Puts <s> before and </s> after a text, as some tokenizers do."""

    eos_token_id = 2

    def __call__(self, text: str, add_special_tokens: bool = True, **_: Any) -> Any:
        ids = tiny_tokenizer()(text).input_ids

        class Output:
            input_ids = [1, *ids, 2] if add_special_tokens else ids

        return Output()


def test_texts_before_an_answer_have_no_end() -> None:
    tokenizer = EndingTokenizer()
    ids = tiny_tokenizer()("fine film").input_ids
    task, row = Task("generation", "{text}", "answer"), {"text": "fine film"}
    assert token_ids(tokenizer, "fine film") == ids
    assert encode_text(task, row, tokenizer) == [1, *ids]
    assert encode_text(task, row, tokenizer, encoder_decoder=True) == [1, *ids, 2]
    assert without_end([], tokenizer) == [] and without_end((5, 2, 2), tokenizer) == [5, 2]


def test_label_words_as_tokens() -> None:
    tokenizer = tiny_tokenizer()
    one = tokenizer("no yes").input_ids
    assert label_words(TASK, tokenizer) == [[one[0]], [one[1]]]
    assert len(label_words(LONG_WORDS, tokenizer)[0]) == 2
    assert label_words(ANSWERS, tokenizer) == []


@pytest.mark.parametrize("side", ["right", "left"])
def test_padding(side: str) -> None:
    ids, mask = padded([[4, 5, 6], [7]], torch.device("cpu"), side=side, value=-100)
    assert ids.tolist() == [[4, 5, 6], [7, -100, -100] if side == "right" else [-100, -100, 7]]
    assert mask.tolist() == [[1, 1, 1], [1, 0, 0] if side == "right" else [0, 0, 1]]


@pytest.mark.parametrize(
    ("package", "absent"), [("tasks", ("datasets",)), ("evaluation", ("scipy", "sklearn", "datasets"))]
)
def test_importing_a_package_does_not_import_heavy_ones(package: str, absent: tuple[str, ...]) -> None:
    code = f"import sys, softprompt_fast.{package}; print([name for name in {absent!r} if name in sys.modules])"
    output = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert output.strip() == "[]"
