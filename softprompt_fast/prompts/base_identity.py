"""Which base model a prompt belongs to: its name, and a fingerprint of its weights that is cheap to compute."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable
from itertools import zip_longest
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..hf.adapters import adapter_parameters
from ..hf.architecture import classifies_rows, peft_config, without_adapters
from ..hf.embedding import own_embedding
from .peft_files import FINGERPRINT, read_base

ROWS, SAMPLES = 16, 64
"""Rows of the embedding, and numbers of each row and of each other matrix, that the fingerprint reads."""
UNKNOWN = "-"
"""The part of a fingerprint that cannot be read, because its weights are quantised, sharded or not loaded."""


def base_fingerprint(model: Any, *, with_pooler: bool = False) -> str:
    """``kind:embedding:layers`` of a transformers model, without its head and its pooler. It takes milliseconds.

    The last two are digests of the signs of some weights. Signs do not depend on the type of the numbers, so a model
    has the same fingerprint in float32, bfloat16 and float16. A part that cannot be read is ``-``. If adapters of PEFT
    run in the layers, their digest follows: ``kind:embedding:layers:adapters``.

    Args:
        with_pooler: as older versions did for models without a head. A pooler may be random at each loading, because
            the checkpoint of a language model has none.
    """
    model = without_adapters(model)
    config = model.config.get_text_config()
    kind = f"{config.model_type}-{getattr(config, 'num_hidden_layers', UNKNOWN)}x{getattr(config, 'hidden_size', 0)}"
    embedding = own_embedding(model.get_input_embeddings()).weight
    backbone = getattr(model, "base_model", model)
    added = {id(parameter) for parameter in adapter_parameters(model)}
    with_pooler = with_pooler and not classifies_rows(model)
    matrices = [
        parameter
        for name, parameter in backbone.named_parameters()
        if parameter is not embedding
        and parameter.dim() > 1
        and id(parameter) not in added
        and (with_pooler or "pooler." not in name)
    ]
    rows = [embedding[row] for row in range(min(ROWS, len(embedding)))] if _readable(embedding) else []
    layers = [matrix.reshape(-1) for matrix in matrices] if all(map(_readable, matrices)) else []
    fingerprint = f"{kind}:{_digest(rows)}:{_digest(layers)}"
    running = list(adapter_parameters(model, running=True))
    if not running:
        return fingerprint
    adapters = [parameter.reshape(-1) for parameter in running] if all(map(_readable, running)) else []
    return f"{fingerprint}:{_digest(adapters)}"


@torch.no_grad()
def weights_sha256(model: Any) -> str | None:
    """The hash of all weights of a model as they are, adapters included; None: some cannot be read.

    It takes a second for each GB or two, and depends on the type of the numbers.
    """
    digest = hashlib.sha256()
    for name, tensor in model.state_dict().items():
        plain = type(tensor) is Tensor and tensor.layout == torch.strided and not tensor.is_quantized
        if not plain or tensor.device.type == "meta":
            return None
        digest.update(f"{name} {tensor.dtype} {list(tensor.shape)};".encode())
        digest.update(tensor.resolve_conj().resolve_neg().reshape(-1).view(torch.uint8).cpu().numpy().data)
    return digest.hexdigest()


def base_facts(model: Any) -> dict[str, Any]:
    """What :func:`write_prompt` writes of a base model: PEFT's fields and the fingerprint."""
    return peft_config(model) | {FINGERPRINT: base_fingerprint(model)}


def same_base(a: str, b: str) -> bool:
    """Whether two fingerprints can be those of one model with the same adapters; unknown parts agree with any."""
    return all(x == y or UNKNOWN in (x, y) for x, y in zip_longest(a.split(":"), b.split(":"), fillvalue="none"))


def check_base(folder: PathLike[str] | str, model: Any, *, force: bool = False) -> None:
    """Refuses the prompt of an adapter folder if it was tuned on other weights than a model's.

    Folders that do not name a fingerprint (PEFT's, and those saved before there was one) are accepted.

    Args:
        force: accept any.

    Raises:
        ValueError: naming both models.
    """
    if not force:
        check_known_base(str(folder), *read_base(folder), model)


def check_known_base(prompt: str, name: str | None, fingerprint: str | None, model: Any) -> None:
    """As :func:`check_base`, of what an adapter folder says.

    Args:
        prompt: the folder or the name, for the message.
        name: of the base model.
        fingerprint: None: any model is accepted.
    """
    if fingerprint is None:
        return
    own = base_fingerprint(model)
    if not same_base(fingerprint, own) and not same_base(fingerprint, base_fingerprint(model, with_pooler=True)):
        same_weights = same_base(*(":".join(each.split(":")[:3]) for each in (fingerprint, own)))
        hint = ", which is the same without or with its adapters (--adapter)" if same_weights else ""
        raise ValueError(
            f"{prompt}: the prompt's base model must be {name or 'unnamed'!r} ({fingerprint}), got "
            f"{getattr(model, 'name_or_path', '') or type(model).__name__!r} ({own}){hint}; force=True (--force) uses "
            "it nevertheless"
        )


def one_base(folders: Iterable[Path]) -> None:
    """Refuses folders whose prompts were tuned on several base models.

    Raises:
        ValueError: naming two of the models, and a prompt of each.
    """
    first: tuple[Path, str | None, str | None] | None = None
    for folder in folders:
        name, fingerprint = read_base(folder)
        if name is None and fingerprint is None:
            continue
        if first is None:
            first = folder, name, fingerprint
            continue
        known = first[2] is not None and fingerprint is not None
        if not (same_base(str(first[2]), str(fingerprint)) if known else first[1] in (name, None) or name is None):
            raise ValueError(
                f"the prompts of a folder must have one base model, got {first[1]!r} ({first[0].name}) and {name!r} "
                f"({folder.name}); move them into a folder for each model, or give --model"
            )


def _readable(weight: Tensor) -> bool:
    return weight.is_floating_point() and type(weight.data) is Tensor and weight.device.type != "meta"


def _spread(length: int) -> Tensor:
    return torch.linspace(0, length - 1, min(SAMPLES, length), dtype=torch.float32).long()


@torch.no_grad()
def _digest(vectors: list[Tensor]) -> str:
    if not vectors:
        return UNKNOWN
    places = {len(v): _spread(len(v)) for v in vectors}
    signs = [torch.signbit(v[places[len(v)].to(v.device)]) for v in vectors]
    bits = torch.cat([sign.cpu() for sign in signs])
    return hashlib.blake2b(bits.numpy().tobytes(), digest_size=8).hexdigest()
