"""Prompts on disk: PEFT's adapter folders (``adapter_config.json``, ``adapter_model.safetensors``). No pickle.

The tensor of a prompt is ``prompt_embeddings``, in float32:

* plain prompts: ``[P, D]``. PEFT's own encoder-decoder prompts hold ``[2 P, D]``; its forward pass reads the first P
  rows, and so do we.
* deep prompts (prefix tuning): ``[P, L * 2 * H' * E]``, each virtual token's key and value of the first layer, then of
  the second, and so on.
* prompts with a token update (DePT): ``[P, D]``, and also ``token_update_a [U, r]`` and ``token_update_b [r, D]``. The
  ``peft_type`` is our own, so PEFT refuses them.
"""

from __future__ import annotations

import json
import logging
import re
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from ..base.files import save_tensors_atomically, write_atomically
from ..base.locations import located

logger = logging.getLogger("softprompt_fast")

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,127}")
CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY = "prompt_embeddings"
FINGERPRINT = "base_fingerprint"
"""Key of the metadata of the weights' file; adapter_config.json has only PEFT's keys, because PEFT warns of others."""
FACTORS = ("token_update_a", "token_update_b")
PLAIN, DEEP, UPDATED = "PROMPT_TUNING", "PREFIX_TUNING", "SOFTPROMPT_FAST_DEPT"


def is_prompt_folder(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()


def safe_name(text: str) -> str:
    """The name of a prompt that any text gives: other characters than letters, digits, ``_`` and ``-`` become ``-``."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:128] or "prompt"


def prompts_by_name(directory: PathLike[str] | str) -> dict[str, Path]:
    """The adapter folders of a directory, or that of a version, by the names of their prompts.

    The names are those of the folders, made safe.

    Raises:
        FileNotFoundError: there are none.
    """
    folders = prompt_folders(directory)
    taken = {folder.resolve().name for folder in folders}
    found: dict[str, Path] = {}
    for folder in folders:
        own = folder.resolve().name
        name = own if NAME.fullmatch(own) else safe_name(own)
        count = 2
        while name in found or (name != own and name in taken):
            name, count = f"{safe_name(own)[:120]}-{count}", count + 1
        found[name] = folder
    renamed = [f"{folder.resolve().name!r} is {name!r}" for name, folder in found.items() if name not in taken]
    if renamed:
        logger.warning("prompts are named by letters, digits, '_' and '-': %s", ", ".join(renamed))
    return found


def prompt_folders(directory: PathLike[str] | str) -> list[Path]:
    """The directory itself if it is an adapter folder, else all adapter folders in it, sorted; or that of a version.

    Raises:
        FileNotFoundError: there are none.
    """
    directory = located(directory)
    if is_prompt_folder(directory):
        return [directory]
    folders = sorted(f for f in directory.iterdir() if is_prompt_folder(f)) if directory.is_dir() else []
    if not folders:
        raise FileNotFoundError(f"{directory} must be a PEFT adapter folder or hold some, but no prompt was found")
    return folders


def write_prompt(
    folder: PathLike[str] | str,
    prompt: Tensor,
    config: dict[str, Any],
    token_update: tuple[Tensor, Tensor] | None = None,
) -> None:
    """Writes an adapter folder; each file appears whole or not at all.

    Args:
        prompt: [P, D]
        config: the model's values of PEFT's fields (``task_type``, ``base_model_name_or_path``, ...), and its
            ``base_fingerprint``, which is written into the weights' file.
        token_update: the factors [U, r] and [r, D] of the prompt's token update, if it has one.
    """
    fields: dict[str, Any] = {
        "peft_type": PLAIN,
        "token_dim": prompt.shape[1],
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "tokenizer_kwargs": None,
    }
    tensors = {KEY: prompt}
    if token_update is not None:
        reach, rank = token_update[0].shape
        fields |= {"peft_type": UPDATED, "token_update_length": reach, "token_update_rank": rank}
        tensors |= dict(zip(FACTORS, token_update, strict=True))
    _write(Path(folder), tensors, fields | config)


def write_prefix(
    folder: PathLike[str] | str, prompt: Tensor, shape: tuple[int, int, int, int], config: dict[str, Any]
) -> None:
    """Writes a deep prompt [P, L * 2 * H' * E] as PEFT's prefix tuning does; `shape`: (L, 2, H', E)."""
    layers, _, heads, size = shape
    fields = {
        "peft_type": DEEP,
        "num_layers": layers,
        "num_attention_heads": heads,  # of keys, as PEFT writes them for grouped queries
        "token_dim": heads * size,
        "encoder_hidden_size": heads * size,
        "prefix_projection": False,
    }
    _write(Path(folder), {KEY: prompt}, config | fields)


def _write(folder: Path, tensors: dict[str, Tensor], config: dict[str, Any]) -> None:
    fields = {
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "num_virtual_tokens": tensors[KEY].shape[0],
        "num_transformer_submodules": 1,
        "num_attention_heads": None,
        "num_layers": None,
    }
    values = {
        key: tensor.detach().to(device="cpu", dtype=torch.float32).contiguous() for key, tensor in tensors.items()
    }
    config = dict(config)
    fingerprint = config.pop(FINGERPRINT, None)
    metadata = {"format": "pt"} | ({} if fingerprint is None else {FINGERPRINT: fingerprint})
    save_tensors_atomically(folder / WEIGHTS_FILE, values, metadata)
    write_atomically(folder / CONFIG_FILE, json.dumps(fields | config, indent=2, sort_keys=True) + "\n")


def read_base(folder: PathLike[str] | str) -> tuple[str | None, str | None]:
    """Name and fingerprint of the base model of an adapter folder, as far as they are known."""
    path = Path(folder) / WEIGHTS_FILE
    name = read_config(folder, None).get("base_model_name_or_path")
    try:
        with safe_open(path, framework="pt") as file:
            fingerprint = (file.metadata() or {}).get(FINGERPRINT)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error
    return name or None, fingerprint


def peft_type(folder: PathLike[str] | str) -> str:
    """The method of an adapter folder, in PEFT's words; raises as :func:`read_prompt` does."""
    return str(read_config(folder, None).get("peft_type"))


def read_config(folder: PathLike[str] | str, kind: str | None = PLAIN) -> dict[str, Any]:
    """The configuration of an adapter folder; raises as :func:`read_prompt` does.

    Args:
        kind: the `peft_type` that it must have; None: any.
    """
    config = _read_json(Path(folder))
    method = config.get("peft_type")
    if kind is not None and method != kind and method == UPDATED:
        raise ValueError(
            f"{folder}: the prompt has a token update, which only SoftPromptModel.load_prompt and from_pretrained read"
        )
    if kind is not None and method != kind:
        raise ValueError(f"{Path(folder) / CONFIG_FILE}: `peft_type` must be {kind!r}, got {method!r}")
    return config


def _read_json(folder: Path) -> dict[str, Any]:
    if not is_prompt_folder(folder):
        raise FileNotFoundError(f"{folder} is not a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} must be JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{folder / CONFIG_FILE} must be a JSON object, got {type(config).__name__}")
    return config


def read_prompt(folder: PathLike[str] | str) -> tuple[Tensor, dict[str, Any]]:
    """The prompt [P, D] (float32) and the configuration of an adapter folder or a version.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a prompt-tuning adapter, or its tensor does not fit its configuration or is not finite.
    """
    folder = located(folder)
    config = read_config(folder)
    return _read_prompt(folder, config), config


def read_updated_prompt(folder: PathLike[str] | str) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Any]]:
    """The prompt [P, D], the factors [U, r] and [r, D] of its token update (float32) and the configuration of a folder.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a prompt with a token update, or a tensor does not fit the others or is not finite.
    """
    folder = Path(folder)
    config = read_config(folder, UPDATED)
    prompt = _read_prompt(folder, config)
    a, b = (_read_tensor(folder / WEIGHTS_FILE, key) for key in FACTORS)
    reach, rank = (config.get(f"token_update_{field}") for field in ("length", "rank"))
    if list(a.shape) != [reach, rank] or list(b.shape) != [rank, prompt.shape[1]]:
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: `{FACTORS[0]}` and `{FACTORS[1]}` must have shapes {[reach, rank]} and "
            f"{[rank, prompt.shape[1]]}, got {list(a.shape)} and {list(b.shape)}"
        )
    return prompt, (a, b), config


def _read_prompt(folder: Path, config: dict[str, Any]) -> Tensor:
    values = _read_tensor(folder / WEIGHTS_FILE, KEY if config.get("peft_type") == UPDATED else None)
    count = config.get("num_virtual_tokens")
    submodules = config.get("num_transformer_submodules") or 1
    if values.dim() != 2 or values.shape[0] not in (count, (count or 0) * submodules):
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: `{KEY}` must have num_virtual_tokens={count} rows, got {list(values.shape)}"
        )
    return values[:count].contiguous()


def read_prefix(folder: PathLike[str] | str, shape: tuple[int, int, int, int]) -> tuple[Tensor, dict[str, Any]]:
    """The deep prompt [P, L * 2 * H' * E] (float32) and the configuration of a prefix-tuning adapter folder.

    Args:
        shape: (L, 2, H', E) of the model's keys and values.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a prefix-tuning adapter, made for a model of another shape, or its numbers are not finite.
    """
    folder = Path(folder)
    config = read_config(folder, DEEP)
    values = _read_tensor(folder / WEIGHTS_FILE)
    layers, two, heads, size = shape
    count = config.get("num_virtual_tokens")
    made_for = [config.get(field) for field in ("num_layers", "num_attention_heads", "token_dim")]
    if made_for != [layers, heads, heads * size]:
        raise ValueError(
            f"{folder}: the prompt must be for [layers, heads, heads * size] = {[layers, heads, heads * size]} like "
            f"the model, got {made_for} (made for {config.get('base_model_name_or_path')!r})"
        )
    if list(values.shape) != [count, layers * two * heads * size]:
        expected = [count, layers * two * heads * size]
        raise ValueError(f"{folder / WEIGHTS_FILE}: `{KEY}` must have shape {expected}, got {list(values.shape)}")
    return values.contiguous(), config


def read_vectors(path: PathLike[str] | str) -> Tensor:
    """[P, D] from an adapter folder, a version, or a safetensors file.

    The file has one tensor, or one named ``prompt_embeddings``.
    """
    path = located(path)
    if path.is_dir():
        return read_prompt(path)[0]
    if not path.is_file():
        raise ValueError(
            "`init` must be random, vocabulary, text, class_labels, a tensor, or the path or version of a prompt "
            f"(in tuning also auto), got {str(path)!r}"
        )
    return _read_tensor(path)


def _read_tensor(path: Path, key: str | None = None) -> Tensor:
    """A tensor of a file.

    Args:
        key: None: the file's only tensor, or the one named KEY; a file that also holds a token update is refused.
    """
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            if key is None and set(FACTORS) & set(keys):
                raise ValueError(f"{path} must hold a prompt alone, got a prompt with a token update")
            if key is None:
                key = KEY if KEY in keys else keys[0] if len(keys) == 1 else None
            elif key not in keys:
                raise ValueError(f"{path} must hold {key!r}, got {keys}")
            if key is None:
                raise ValueError(f"{path} must hold one tensor, or one named {KEY!r}, got {keys}")
            values: Tensor = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error
    if not values.is_floating_point() or not torch.isfinite(values).all():
        raise ValueError(f"{path}: `{key}` must be finite floating-point numbers")
    return values.float()
