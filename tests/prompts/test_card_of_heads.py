"""Cards of prompts whose task a head answers: labels, scores, the head's weights, and code that loads it."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from huggingface_hub import ModelCard
from support.tiny_heads import HEADS, questions, save_model, tagged
from support.tiny_models import BERT

import softprompt_fast as spf
from softprompt_fast.hf import load_model_with_head
from softprompt_fast.prompts import write_card
from softprompt_fast.tasks import answering_task, sequence_task, tagging_task
from softprompt_fast.tuning import tune

SENTENCES = [("great", "good"), ("awful", "bad"), ("dull", "meh")] * 8
TEXTS = [{"text": f"{word} film", "label": label} for word, label in SENTENCES]
MADE = {HEADS[0]: sequence_task, HEADS[1]: tagging_task}
ROWS = {HEADS[0]: TEXTS, HEADS[1]: tagged(24), HEADS[2]: questions(24)}
PIPELINES = {HEADS[0]: "text-classification", HEADS[1]: HEADS[1], HEADS[2]: HEADS[2]}
MAIN = {HEADS[0]: "accuracy", HEADS[1]: "span_f1", HEADS[2]: "exact_match"}


def tuned_run(folder: Path, head: str, kind: str, **options: Any) -> tuple[Path, Path]:
    """A short run of a head; the base model's folder and the prompt's."""
    base = save_model(folder / "base", kind)
    rows = ROWS[head]
    task = MADE[head](rows, model=str(base)) if head in MADE else answering_task(model=str(base))
    loaded = load_model_with_head(str(base), head, task.labels, "float32", "cpu")
    model = spf.SoftPromptModel(loaded.model, **{"train_head": True} | options)
    result = tune(model, loaded.tokenizer, task, rows[:12], rows[12:], folder / "run", steps=2, num_virtual_tokens=2)
    return base, result.folder


@pytest.mark.parametrize("kind", ["encoder", "decoder"])
@pytest.mark.parametrize("head", HEADS)
def test_the_card_of_a_head_is_true_and_its_code_runs(head: str, kind: str, tmp_path: Path) -> None:
    base, folder = tuned_run(tmp_path, head, kind)
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data
    assert data.pipeline_tag == PIPELINES[head]
    after = json.loads((tmp_path / "run" / "metrics.json").read_text())["after"]
    found = {result.metric_type: result for result in data.eval_results}
    assert {result.task_type for result in data.eval_results} == {PIPELINES[head]}
    assert set(found) == {name for name in ("accuracy", "span_f1", "exact_match", "f1", "loss") if name in after}
    assert found[MAIN[head]].metric_value == after[MAIN[head]] and f"| {MAIN[head]} | {after[MAIN[head]]:.3f}" in text
    assert "Trained weights of the model's head come with it." in text and "model's own weights" not in text
    assert "words that the model says" not in text and "{}" not in text
    labels = sorted({row["label"] for row in TEXTS}) if head == HEADS[0] else ["B-LOC", "B-PER", "I-LOC", "O"]
    assert (json.dumps(labels, indent=2) in text) == (head != HEADS[2])
    assert (f"num_labels={len(labels)}" in text) == (head != HEADS[2])

    ours, theirs = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    loaded = spf.prompts.read_prompt(folder)[0]
    for code in (ours, theirs) if _has_peft() else (ours,):
        values: dict[str, Any] = {}
        exec(code.replace("path/to/the/base/model", str(base)).replace("path/to/prompt", str(folder)), values)
        model = values.get("tuned", values["model"])
        assert any(torch.equal(value.detach().cpu(), loaded) for value in model.parameters())


def _has_peft() -> bool:
    try:
        import peft  # noqa: F401
    except ImportError:
        return False
    return True


def test_a_frozen_head_is_not_said_to_be_trained(tmp_path: Path) -> None:
    _, folder = tuned_run(tmp_path, HEADS[0], "encoder", train_head=False)
    assert "The model's own weights are unchanged." in (folder / "README.md").read_text()


def test_the_code_knows_the_labels_of_a_head_without_a_task(tmp_path: Path) -> None:
    """Also where the head has a pooler: its matrix gives hidden states, no labels."""
    transformers.BertModel(transformers.BertConfig(**BERT), add_pooling_layer=False).save_pretrained(tmp_path / "base")
    auto = transformers.AutoModelForSequenceClassification
    model = spf.SoftPromptModel(auto.from_pretrained(tmp_path / "base", num_labels=3), train_head=True)
    model.add_prompt("p", 3)
    model.save_pretrained(tmp_path)
    names = json.loads((tmp_path / "p" / "adapter_config.json").read_text())["modules_to_save"]
    assert sorted(names) == ["bert.pooler", "classifier"]
    write_card(tmp_path / "p")
    assert "num_labels=3" in (tmp_path / "p" / "README.md").read_text()
