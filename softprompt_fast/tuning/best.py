"""The best state of each prompt of a run, on disk, whatever the others do; survives interruption and resumption."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import torch

from ..evaluation.scores import rank
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.peft_files import read_updated_prompt

FILE = "best.json"


class BestPrompts:
    """Keeps, for each prompt, the values with the best held-out score.

    Args:
        by: "loss", or "accuracy" and then loss; scores without an accuracy go by loss.
    """

    def __init__(self, model: SoftPromptModel, folder: Path, by: str = "loss") -> None:
        self.model = model
        self.by = by
        self.folder = folder
        file = folder / FILE
        self.found: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}

    def update(self, name: str, scores: dict[str, float], step: int) -> bool:
        """Keeps a prompt's present values if they score better than all before; whether they do."""
        before = self.found.get(name)
        if before is not None and not rank(scores, self.by) > rank(before["scores"], self.by):
            return False
        self.model.save_pretrained(self.folder, [name])
        self.found[name] = {"step": step, "scores": scores}
        partial = self.folder / f".{FILE}.{os.getpid()}"
        partial.write_text(json.dumps(self.found, indent=2) + "\n")
        os.replace(partial, self.folder / FILE)
        return True

    @torch.no_grad()
    def restore(self, name: str) -> dict[str, float]:
        """Copies the best values into the model's prompt, an ordinary parameter by now; returns their scores."""
        factors = self.model.prompts.token_update(name)
        if factors is None:
            self.model.prompts[name].copy_(self.model.read_prompt(self.folder / name))
        else:
            values, best, _ = read_updated_prompt(self.folder / name)
            self.model.prompts[name].copy_(values)
            for factor, found in zip(factors, best, strict=True):
                factor.copy_(found)
        scores: dict[str, float] = self.found[name]["scores"]
        return scores
