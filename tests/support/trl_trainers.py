"""TRL's trainers on four rows with a tiny model, and the numbers of each row run alone, without padding."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import softprompt_fast as spf
from support.deep_rows_alone import deep_alone
from support.peft_models import VIRTUAL, peft_model
from support.rows_alone import alone
from support.tiny_models import build
from support.tiny_reviews import tiny_tokenizer

TEXTS = ["film plot very fine", "film", "very very dull film plot", "great plot"]
ANSWERS = ["yes", "no no", "no", "yes very yes"]
WRONG = ["no", "yes", "yes yes yes", "no"]
PREFERENCES = [
    {"prompt": text + " Label : ", "chosen": answer, "rejected": wrong}
    for text, answer, wrong in zip(TEXTS, ANSWERS, WRONG, strict=True)
]


def make(kind: str) -> Any:
    """A model with one prompt."""
    if kind in ("peft", "prefix"):
        return spf.accelerate(peft_model(kind="PromptTuning" if kind == "peft" else "PrefixTuning"))
    tuned_class = spf.DeepPromptModel if kind == "deep" else spf.SoftPromptModel
    tuned = tuned_class(build("bloom" if kind == "padded" else "llama"))
    tuned.add_prompt("p", init=torch.randn(VIRTUAL, tuned.prompts.embedding_dim) * 0.5)
    return tuned


def settings(config: Any, folder: Path, **options: Any) -> Any:
    common: dict[str, Any] = {"max_steps": 2, "per_device_train_batch_size": 4, "learning_rate": 1e-2}
    common |= {"report_to": [], "use_cpu": True, "bf16": False, "disable_tqdm": True, "logging_steps": 1}
    return config(str(folder), **common | {"save_strategy": "no"} | options)


def trained(model: Any) -> Tensor:
    """The numbers that are trained."""
    parameters = [p for name, p in model.named_parameters() if p.requires_grad and ".ref." not in name]
    return torch.cat([p.detach().flatten() for p in parameters]).clone()


def logits_before(model: Any, ids: list[int], *, prompt: bool) -> Tensor:
    """[T, V], the logits that predict each token of a row that runs alone; NaN where nothing does."""
    tokens = torch.tensor(ids)
    with torch.no_grad():
        if isinstance(model, spf.DeepPromptModel):
            logits = deep_alone(model, tokens, model.prompts["p"] if prompt else None)
        elif isinstance(model, spf.SoftPromptModel):
            logits = alone(model, tokens, "p" if prompt else None)[0].logits[0]
        else:
            vectors = model.base_model.get_input_embeddings()(tokens)
            joined = torch.cat([model.get_prompt(1)[0], vectors]) if prompt else vectors
            logits = model.base_model(inputs_embeds=joined[None]).logits[0]
    before = logits[-len(ids) - 1 : -1]
    missing = len(ids) - len(before)
    return torch.cat([logits.new_full((missing, logits.shape[1]), float("nan")), before])


def log_probs(model: Any, ids: list[int], *, prompt: bool, temperature: float = 1.0) -> Tensor:
    """[T], of each token of a row that runs alone; NaN where nothing predicts it."""
    every = (logits_before(model, ids, prompt=prompt) / temperature).log_softmax(1)
    return every[torch.arange(len(ids)), torch.tensor(ids)]


def sft(model: Any, folder: Path, rows: list[dict[str, str]] | None = None, **options: Any) -> Any:
    import datasets
    import trl

    rows = [{"text": text} for text in TEXTS] if rows is None else rows
    return trl.SFTTrainer(
        model,
        settings(trl.SFTConfig, folder, **options),
        train_dataset=datasets.Dataset.from_list(rows),
        processing_class=tiny_tokenizer(),
    )


def dpo(model: Any, folder: Path, trainer_class: Any = None, ref_model: Any = None, **options: Any) -> Any:
    import datasets
    import trl

    from softprompt_fast.interop.trl import DPOTrainer

    return (trainer_class or DPOTrainer)(
        model,
        ref_model,
        settings(trl.DPOConfig, folder, beta=0.3, **options),
        train_dataset=datasets.Dataset.from_list(PREFERENCES),
        processing_class=tiny_tokenizer(),
    )


def reward(completion_ids: list[list[int]], **columns: Any) -> list[float]:
    return [float(sum(ids) % 7) for ids in completion_ids]


def grpo(model: Any, folder: Path, **options: Any) -> Any:
    import datasets
    import trl

    from softprompt_fast.interop.trl import GRPOTrainer

    more = {k: options.pop(k) for k in ("ref_model",) if k in options}
    values = {"beta": 0.1, "num_generations": 2, "max_completion_length": 5, "temperature": 0.7} | options
    return GRPOTrainer(
        model,
        reward,
        settings(trl.GRPOConfig, folder, **values),
        train_dataset=datasets.Dataset.from_list([{"prompt": row["prompt"]} for row in PREFERENCES]),
        processing_class=tiny_tokenizer(),
        **more,
    )
