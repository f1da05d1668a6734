"""A prompt before its first step: its initial values, its place, and the form it is trained in."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..base.locations import is_remote, located
from ..hf.architecture import is_encoder_decoder
from ..hf.embedding import embedding_table
from ..models.deep_prompt_model import DeepPromptModel
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.initialization import initial_prompt
from ..prompts.placement import FixedFirst, bos_vector, check_frozen, frozen_count
from ..prompts.reparameterization import (
    LowRank,
    NormBound,
    Offset,
    PromptDropout,
    ResidualMLP,
    SharedPart,
    fold,
    reparameterize,
)
from ..prompts.vector_files import read_vectors
from ..tasks.task import TASK_FILE, Task
from .settings import DEFAULT_TOKENS, TuningSettings, instruction


def check_form(model: SoftPromptModel, tokenizer: Any, settings: TuningSettings) -> None:
    """Checks that the model can have a prompt of this place and form.

    Raises:
        ValueError: naming the setting that the model cannot have.
    """
    if isinstance(model, DeepPromptModel):
        for name in ("norm_bound", "token_update_rank"):
            if getattr(settings, name) is not None:
                raise ValueError(f"`{name}` cannot be combined with deep prompts")
    elif settings.num_frozen_tokens:
        raise ValueError(f"`num_frozen_tokens` must be 0 unless prompts are deep, got {settings.num_frozen_tokens}")
    if settings.placement == "after_bos":
        if isinstance(model, DeepPromptModel):
            raise ValueError("placement='after_bos' cannot be combined with deep prompts, which hold no token")
        if is_encoder_decoder(model.base_model):
            raise ValueError("placement='after_bos' cannot be combined with encoder-decoders")
        bos_vector(model, tokenizer)


def add_prompt(model: SoftPromptModel, tokenizer: Any, task: Task, settings: TuningSettings) -> None:
    """Adds ``task.prompt`` with the initial values that the settings ask for."""
    count = settings.num_virtual_tokens
    init: Any = settings.init
    if isinstance(init, (str, PathLike)) and is_remote(init):
        init = located(init)
    if isinstance(init, str) and init == "auto":
        init, count = _automatic(model, tokenizer, task, count)
    elif count is None and isinstance(init, str) and init in ("random", "vocabulary", "class_labels"):
        count = DEFAULT_TOKENS
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "init_text": settings.init_text,
        "class_labels": list(_texts_of_labels(task).values()),
        "seed": settings.seed,
    }
    if isinstance(init, (str, PathLike)) and _holds_bos(init):
        init = read_vectors(init)[1:]  # without BOS's vector: the text holds BOS, or it is put in front again below
    if settings.placement == "after_bos":
        bos = bos_vector(model, tokenizer)
        if isinstance(init, str) and init in model.prompts:
            init = model.prompts.snapshot(init)
        values = initial_prompt(init, count, embedding_table(model.get_input_embeddings()), **options)
        init, count = torch.cat([bos[None].to(values), values]), None
    parameter = model.add_prompt(task.prompt, count, init=init, **options)
    if settings.init_noise:
        generator = torch.Generator().manual_seed(settings.seed)
        noise = torch.randn(parameter.shape, generator=generator, dtype=torch.float32).to(parameter)
        noise[: settings.num_frozen_tokens] = 0
        with torch.no_grad():
            parameter.add_(noise * parameter.std() * settings.init_noise)


def _holds_bos(init: str | PathLike[str]) -> bool:
    """Whether a saved prompt was tuned with ``placement="after_bos"``."""
    return (Path(init) / TASK_FILE).is_file() and Task.load(init).prompt_holds_bos


def _automatic(
    model: SoftPromptModel, tokenizer: Any, task: Task, count: int | None
) -> tuple[str | Tensor, int | None]:
    """An instruction that names the labels, repeated to length; its end comes just before the text."""
    count = count or DEFAULT_TOKENS
    if task.kind != "classification":
        return "vocabulary", count
    ids = list(tokenizer(instruction(_texts_of_labels(task)), add_special_tokens=False).input_ids)
    if len(ids) > count:  # a truncated sentence would name only some of the labels
        return "class_labels", count
    ids = (ids * -(-count // len(ids)))[-count:]
    table = embedding_table(model.get_input_embeddings())
    return table(torch.tensor(ids, device=table.weight.device)).detach().float().cpu(), None


def _texts_of_labels(task: Task) -> dict[str, str]:
    """What stands for each label in a text: its word, or for a head the label itself."""
    return task.label_words or {label: label for label in task.labels}


def set_form(
    model: SoftPromptModel, tokenizer: Any, name: str, settings: TuningSettings, shared: nn.Parameter | None = None
) -> None:
    """Computes a prompt in the form that the settings ask for while it is trained; ``fold`` makes it plain again.

    Args:
        shared: vectors [S, D] in front of this prompt and others.
    """
    bank = model.prompts
    values = bank[name].detach()
    held = frozen_count(bank, name) if isinstance(model, DeepPromptModel) else 0
    if held:
        fold(bank, name)  # they are fixed again below, after the other forms
    frozen = max(held, settings.num_frozen_tokens)
    check_frozen(frozen, len(values))
    # The order matters: each form works on the result of the one before.
    if settings.reparameterization == "low-rank":
        reparameterize(bank, name, LowRank(len(values), values.shape[1], settings.rank))
    elif settings.decay_to_initial:
        reparameterize(bank, name, Offset(values))
    if settings.reparameterization == "residual":
        reparameterize(bank, name, ResidualMLP(values.shape[1], settings.bottleneck))
    if shared is not None:
        reparameterize(bank, name, SharedPart(shared))
    if settings.norm_bound is not None:
        reparameterize(bank, name, NormBound(settings.norm_bound * mean_norm(model)))
    if settings.prompt_dropout:
        reparameterize(bank, name, PromptDropout(settings.prompt_dropout))
    if settings.placement == "after_bos":
        reparameterize(bank, name, FixedFirst(bos_vector(model, tokenizer)))
    if frozen:
        reparameterize(bank, name, FixedFirst(values[:frozen]))


def mean_norm(model: SoftPromptModel) -> float:
    """Mean norm of the model's token embeddings, as the model sees them."""
    table = embedding_table(model.get_input_embeddings())
    return torch.linalg.vector_norm(table.weight.detach().float(), dim=1).mean().item() * abs(table.scale)
