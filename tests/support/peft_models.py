"""Tiny PEFT models with a random prompt, the same for the same arguments, and without dropout."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
import transformers as tf
from torch import Tensor

from .tiny_models import ALL

VIRTUAL = 5
TASKS = {
    "CausalLM": "CAUSAL_LM",
    "Seq2SeqLM": "SEQ_2_SEQ_LM",
    "SequenceClassification": "SEQ_CLS",
    "TokenClassification": "TOKEN_CLS",
    "QuestionAnswering": "QUESTION_ANS",
}
IDS = torch.randint(3, 90, (4, 9), generator=torch.Generator().manual_seed(1))
LENGTHS = (9, 5, 7, 6)
FULL = torch.ones_like(IDS)
RIGHT = torch.tensor([[column < length for column in range(9)] for length in LENGTHS]).long()
LEFT = RIGHT.flip(1)
MASKS = {"full": FULL, "right": RIGHT, "left": LEFT}


def base_model(name: str, head: str = "CausalLM") -> Any:
    config = ALL[name]()
    for key, value in vars(config).items():
        if "drop" in key and isinstance(value, float):
            setattr(config, key, 0.0)
    torch.manual_seed(0)
    model = getattr(tf, f"AutoModelFor{head}").from_config(config)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.dim() > 1:
                parameter.normal_(0, 0.25)
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.0
    return model


def peft_model(name: str = "llama", head: str = "CausalLM", kind: str = "PromptTuning", **options: Any) -> Any:
    """A model in training mode.

    Args:
        kind: of PEFT's configuration classes.
    """
    import peft

    config = adapter_config(head, kind, **options)
    model = peft.get_peft_model(base_model(name, head), config)
    return fill(model).train()


def adapter_config(head: str = "CausalLM", kind: str = "PromptTuning", **options: Any) -> Any:
    import peft

    config = getattr(peft, f"{kind}Config")
    return config(**{"task_type": TASKS[head], "num_virtual_tokens": VIRTUAL} | options)


def fill(model: Any, seed: int = 3) -> Any:
    """Gives every prompt of a model random numbers that matter."""
    torch.manual_seed(seed)
    with torch.no_grad():
        for parameter in model.prompt_encoder.parameters():
            parameter.normal_(0, 0.4)
    return model


def batch(padding: str = "right", head: str = "CausalLM") -> dict[str, Tensor]:
    mask = MASKS[padding]
    inputs = {"input_ids": IDS, "attention_mask": mask}
    if head == "CausalLM":
        return inputs | {"labels": IDS.masked_fill(mask == 0, -100)}
    if head == "Seq2SeqLM":
        return inputs | {"labels": IDS[:, :6].flip(0)}
    if head == "SequenceClassification":
        return inputs | {"labels": torch.tensor([0, 1, 1, 0])}
    if head == "TokenClassification":
        return inputs | {"labels": (IDS % 2).masked_fill(mask == 0, -100)}
    first = mask.argmax(1)
    return inputs | {"start_positions": first + 1, "end_positions": first + torch.tensor([5, 3, 2, 4])}


def losses(model: Any, inputs: dict[str, Tensor], steps: int) -> list[float]:
    """The losses of an ordinary training loop."""
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=1e-2)
    curve = []
    for _ in range(steps):
        loss = model(**inputs).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        curve.append(loss.item())
    return curve


def row(inputs: dict[str, Tensor], n: int) -> dict[str, Tensor]:
    """A row without its padding."""
    real = inputs["attention_mask"][n] != 0
    start = int(real.long().argmax())
    alone = {}
    for name, value in inputs.items():
        one = value[n : n + 1]
        if name.endswith("_positions"):
            one = one - start
        elif value.shape == inputs["input_ids"].shape:
            one = one[:, real]
        alone[name] = one
    return alone


@contextmanager
def counted(model: Any) -> Iterator[list[int]]:
    """The numbers of positions of each call of a base model's input."""
    widths: list[int] = []

    def note(module: Any, args: Any, keywords: dict[str, Any]) -> None:
        vectors = keywords.get("inputs_embeds")
        widths.append(-1 if vectors is None else vectors.shape[0] * vectors.shape[1])

    hook = model.base_model.register_forward_pre_hook(note, with_kwargs=True)
    try:
        yield widths
    finally:
        hook.remove()
