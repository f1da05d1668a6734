"""Tasks, models and prompts of the tests of analyses."""

from __future__ import annotations

import json
from typing import Any

import torch

import softprompt_fast as spf
from softprompt_fast.tasks.collation import Collator
from softprompt_fast.tasks.encoding import encode
from softprompt_fast.tasks.task import Task, classification_task, generation_task
from support.tiny_models import build
from support.tiny_reviews import reviews, tiny_tokenizer

TASKS = {
    "one-token": classification_task(reviews(), prompt="p"),
    "several-tokens": Task("classification", "{text}", "label", {"yes": " very fine", "no": " dull"}, prompt="p"),
    "generation": generation_task(input_column="text", output_column="label", prompt="p"),
}


def tuned_on(architecture: str = "llama", **prompts: torch.Tensor) -> spf.SoftPromptModel:
    tuned = spf.SoftPromptModel(build(architecture))
    for name, values in prompts.items():
        tuned.add_prompt(name, init=values)
    return tuned


def sane(values: Any) -> Any:
    """What a JSON file would give back; NaN and infinity are no JSON."""
    return json.loads(json.dumps(values, allow_nan=False))


def helpful_prompt(task: Task) -> torch.Tensor:
    """Two vectors trained for a moment, and three of noise that was never looked at."""
    tuned, tokenizer = tuned_on(p=torch.randn(2, 32) * 0.25), tiny_tokenizer()
    batch = Collator(0)(encode(task, reviews(64), tokenizer))
    optimizer = torch.optim.Adam(tuned.prompts.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        tuned(batch["input_ids"], batch["attention_mask"], batch["labels"], "p").loss.backward()
        optimizer.step()
    noise = torch.randn(3, 32) * 1.5
    return torch.cat([noise[:1], tuned.prompts["p"].detach(), noise[1:]])
