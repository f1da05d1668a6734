"""A prompt before its first step: first values, place, and the form it is trained in."""

from __future__ import annotations

from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from ..hf.architecture import is_encoder_decoder
from ..hf.embedding import embedding_table
from ..models.deep_prompt_model import DeepPromptModel
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.initialization import initial_prompt
from ..prompts.peft_files import read_vectors
from ..prompts.placement import FixedFirst, bos_vector
from ..prompts.reparameterization import (
    LowRank,
    NormBound,
    Offset,
    PromptDropout,
    ResidualMLP,
    SharedPart,
    reparameterize,
)
from ..tasks.encoding import token_ids
from ..tasks.task import TASK_FILE, Task
from .settings import DEFAULT_TOKENS, TuningSettings, instruction


def check_form(model: SoftPromptModel, tokenizer: Any, settings: TuningSettings) -> None:
    """Whether the model can have a prompt of this place and form.

    Raises:
        ValueError: naming the setting, the rule and the value.
    """
    if isinstance(model, DeepPromptModel):
        if settings.norm_bound is not None:
            raise ValueError(f"`norm_bound` must be None for deep prompts, got {settings.norm_bound}")
        if settings.token_update_rank is not None:
            raise ValueError(f"`token_update_rank` must be None for deep prompts, got {settings.token_update_rank}")
    if settings.placement == "after_bos":
        if isinstance(model, DeepPromptModel):
            raise ValueError("`placement` must be 'before_bos' for deep prompts, which hold no token, got 'after_bos'")
        if is_encoder_decoder(model.base_model):
            raise ValueError("`placement` must be 'before_bos' for encoder-decoders; got 'after_bos'")
        bos_vector(model, tokenizer)


def add_prompt(model: SoftPromptModel, tokenizer: Any, task: Task, settings: TuningSettings) -> None:
    """Adds ``task.prompt`` with the first values that the settings ask for."""
    count = settings.num_virtual_tokens
    init: Any = settings.init
    if isinstance(init, str) and init == "auto":
        init, count = _automatic(model, tokenizer, task, count)
    elif count is None and isinstance(init, str) and init in ("random", "vocabulary", "class_labels"):
        count = DEFAULT_TOKENS
    options: dict[str, Any] = {
        "tokenizer": tokenizer,
        "init_text": settings.init_text,
        "class_labels": list(task.label_words.values()),
        "seed": settings.seed,
    }
    if isinstance(init, (str, PathLike)) and _holds_bos(init):
        init = read_vectors(init)[1:]  # its first vector is BOS's, which stands in the text or is put in front again
    if settings.placement == "after_bos":
        bos = bos_vector(model, tokenizer)
        if isinstance(init, str) and init in model.prompts:
            init = model.prompts.snapshot(init)
        values = initial_prompt(init, count, embedding_table(model.get_input_embeddings()), **options)
        init, count = torch.cat([bos[None].to(values), values]), None
    parameter = model.add_prompt(task.prompt, count, init=init, **options)
    if settings.init_noise:
        generator = torch.Generator().manual_seed(settings.seed)
        noise = torch.randn(parameter.shape, generator=generator).to(parameter)
        with torch.no_grad():
            parameter.add_(noise * parameter.std() * settings.init_noise)


def _holds_bos(init: str | PathLike[str]) -> bool:
    """Whether a saved prompt was tuned behind BOS."""
    return (Path(init) / TASK_FILE).is_file() and not Task.load(init).special_tokens


def _automatic(
    model: SoftPromptModel, tokenizer: Any, task: Task, count: int | None
) -> tuple[str | Tensor, int | None]:
    """An instruction that names the labels, repeated to length so that its end stands before the text."""
    count = count or DEFAULT_TOKENS
    if task.kind != "classification":
        return "vocabulary", count
    ids = token_ids(tokenizer, instruction(task.label_words))
    if len(ids) > count:  # a torn sentence would name some of the labels only
        return "class_labels", count
    ids = (ids * -(-count // len(ids)))[-count:]
    table = embedding_table(model.get_input_embeddings())
    return table(torch.tensor(ids, device=table.weight.device)).detach().float().cpu(), None


def set_form(
    model: SoftPromptModel, tokenizer: Any, name: str, settings: TuningSettings, shared: nn.Parameter | None = None
) -> None:
    """Lets a prompt be computed as the settings say while it is trained; ``fold`` undoes it.

    Args:
        shared: vectors [S, D] that stand in front of this and other prompts.
    """
    bank = model.prompts
    values = bank[name].detach()
    # After values are read, in this order: each form works on what the one before gives.
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


def mean_norm(model: SoftPromptModel) -> float:
    """Mean length of the model's token embeddings as the model sees them."""
    table = embedding_table(model.get_input_embeddings())
    return torch.linalg.vector_norm(table.weight.detach().float(), dim=1).mean().item() * abs(table.scale)
