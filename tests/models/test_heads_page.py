"""The examples of docs/heads.md run, on tiny models in place of those that they name."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support.tiny_models import BERT, build
from support.tiny_reviews import tiny_tokenizer

PAGE = Path(__file__).resolve().parents[2] / "docs" / "heads.md"
EXAMPLES = [
    code
    for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text() if PAGE.is_file() else "", re.M | re.S)
    if "tune(" not in code  # tests/tuning/test_tuning_heads.py runs what it does
]


def tiny_model(head: str) -> Any:
    if not head:
        return tf.ModernBertModel(build("modernbert").config).eval()
    return build("roberta" if head == "QuestionAnswering" else "modernbert", head=head)


@pytest.mark.skipif(not EXAMPLES, reason="not a source tree")
@pytest.mark.parametrize("number", range(len(EXAMPLES)))
def test_an_example(number: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(tf.AutoTokenizer, "from_pretrained", lambda name: tiny_tokenizer())
    for head in ("", "SequenceClassification", "TokenClassification", "QuestionAnswering"):
        kind = getattr(tf, f"AutoModelFor{head}" if head else "AutoModel")
        monkeypatch.setattr(kind, "from_pretrained", lambda name, head=head, **options: tiny_model(head))
    names: dict[str, Any] = {}
    exec(EXAMPLES[number], names)
    tuned, batch = names["tuned"], names["batch"]
    assert tuned.prompts.names
    if "tags" in names:
        assert names["tags"].shape == batch.input_ids.shape
    if "start" in names:
        assert batch.attention_mask[torch.arange(2), names["start"]].all()
    if "vectors" in names:
        assert names["vectors"].shape == (2, BERT["hidden_size"])


def test_there_is_an_example_for_each_head() -> None:
    assert len(EXAMPLES) == 4 or not PAGE.is_file()
