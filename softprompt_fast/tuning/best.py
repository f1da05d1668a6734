"""The best values of each prompt of a run, kept on disk; they survive interruption and resumption."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch

from ..base.files import write_atomically
from ..evaluation.scores import rank
from ..models.head_weights import install_head, stored_head
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.peft_files import read_updated_prompt

BEST_FILE = "best.json"


class BestPrompts:
    """Keeps, for each prompt, the values with the best held-out score, and the head that they were scored with.

    Args:
        by: "loss", or "accuracy" and then loss. Scores without an accuracy are ranked by loss.
    """

    def __init__(self, model: SoftPromptModel, folder: Path, by: str = "loss") -> None:
        self.model = model
        self.by = by
        self.folder = folder
        file = folder / BEST_FILE
        self.entries: dict[str, dict[str, Any]] = json.loads(file.read_text()) if file.is_file() else {}
        """The ``step`` and the ``scores`` of each prompt's best values."""

    def update(self, name: str, scores: dict[str, float], step: int) -> bool:
        """Keeps a prompt's present values if they score better than all before; returns whether they do."""
        before = self.entries.get(name)
        if before is not None and not rank(scores, self.by) > rank(before["scores"], self.by):
            return False
        self.model.save_pretrained(self.folder, [name])
        self.entries[name] = {"step": step, "scores": scores}
        write_atomically(self.folder / BEST_FILE, json.dumps(self.entries, indent=2) + "\n")
        return True

    @torch.no_grad()
    def restore(self, name: str) -> dict[str, float]:
        """Copies the best values into the model's prompt, which must be folded, and head; returns their scores."""
        head = stored_head(self.folder / name, self.model.base_model) if self.model.trains_head else {}
        install_head(head, self.model.base_model)
        factors = self.model.prompts.token_update(name)
        if factors is None:
            self.model.prompts[name].copy_(self.model.read_prompt(self.folder / name, loaded=head))
        else:
            values, best_factors, _ = read_updated_prompt(self.folder / name, loaded=head)
            self.model.prompts[name].copy_(values)
            for factor, best in zip(factors, best_factors, strict=True):
                factor.copy_(best)
        scores: dict[str, float] = self.entries[name]["scores"]
        return scores
