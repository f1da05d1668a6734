"""Prompts on disk: PEFT's adapter folders (``adapter_config.json``, ``adapter_model.safetensors``). No pickle.

The one tensor is ``prompt_embeddings [P, D]`` in float32. PEFT's own encoder-decoder prompts hold ``[2 P, D]``, of
which its forward pass reads the first P rows; so do we.
"""

from __future__ import annotations

import json
import os
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from torch import Tensor

CONFIG_FILE = "adapter_config.json"
WEIGHTS_FILE = "adapter_model.safetensors"
KEY = "prompt_embeddings"


def is_prompt_folder(path: Path) -> bool:
    return (path / CONFIG_FILE).is_file() and (path / WEIGHTS_FILE).is_file()


def prompt_folders(directory: PathLike[str] | str) -> list[Path]:
    """The directory itself, if it is an adapter folder, or all adapter folders in it, sorted.

    Raises:
        FileNotFoundError: there is none.
    """
    directory = Path(directory)
    if is_prompt_folder(directory):
        return [directory]
    folders = sorted(f for f in directory.iterdir() if is_prompt_folder(f)) if directory.is_dir() else []
    if not folders:
        raise FileNotFoundError(f"{directory} must be a PEFT adapter folder or hold some, but no prompt was found")
    return folders


def write_prompt(folder: PathLike[str] | str, prompt: Tensor, config: dict[str, Any]) -> None:
    """Writes an adapter folder; each file appears whole or not at all.

    Args:
        prompt: [P, D]
        config: facts of the model, merged into PEFT's fields (``task_type``, ``base_model_name_or_path``, ...).
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    fields = {
        "peft_type": "PROMPT_TUNING",
        "task_type": None,
        "auto_mapping": None,
        "base_model_name_or_path": None,
        "revision": None,
        "inference_mode": True,
        "num_virtual_tokens": prompt.shape[0],
        "token_dim": prompt.shape[1],
        "num_transformer_submodules": 1,
        "num_attention_heads": None,
        "num_layers": None,
        "prompt_tuning_init": "RANDOM",
        "prompt_tuning_init_text": None,
        "tokenizer_name_or_path": None,
        "tokenizer_kwargs": None,
    }
    values = prompt.detach().to(device="cpu", dtype=torch.float32).contiguous()
    partial = folder / f".{WEIGHTS_FILE}.{os.getpid()}"
    save_file({KEY: values}, partial, metadata={"format": "pt"})
    os.replace(partial, folder / WEIGHTS_FILE)
    partial = folder / f".{CONFIG_FILE}.{os.getpid()}"
    partial.write_text(json.dumps(fields | config, indent=2, sort_keys=True) + "\n")
    os.replace(partial, folder / CONFIG_FILE)


def read_config(folder: PathLike[str] | str) -> dict[str, Any]:
    """The configuration of a prompt-tuning adapter folder; raises as :func:`read_prompt` does."""
    folder = Path(folder)
    if not is_prompt_folder(folder):
        raise FileNotFoundError(f"{folder} must be a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    try:
        config = json.loads((folder / CONFIG_FILE).read_text())
    except (UnicodeDecodeError, json.JSONDecodeError) as error:
        raise ValueError(f"{folder / CONFIG_FILE} must be JSON: {error}") from error
    if not isinstance(config, dict) or config.get("peft_type") != "PROMPT_TUNING":
        found = config.get("peft_type") if isinstance(config, dict) else type(config).__name__
        raise ValueError(f"{folder / CONFIG_FILE}: `peft_type` must be 'PROMPT_TUNING', got {found!r}")
    return config


def read_prompt(folder: PathLike[str] | str) -> tuple[Tensor, dict[str, Any]]:
    """The prompt [P, D] (float32) and the configuration of an adapter folder.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a prompt-tuning adapter, or its tensor does not fit its configuration or is not finite.
    """
    folder = Path(folder)
    config = read_config(folder)
    values = _read_tensor(folder / WEIGHTS_FILE)
    count = config.get("num_virtual_tokens")
    submodules = config.get("num_transformer_submodules") or 1
    if values.dim() != 2 or values.shape[0] not in (count, (count or 0) * submodules):
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: `{KEY}` must have num_virtual_tokens={count} rows, got {list(values.shape)}"
        )
    return values[:count].contiguous(), config


def read_vectors(path: PathLike[str] | str) -> Tensor:
    """[P, D] from an adapter folder, or from a safetensors file with one tensor or one named ``prompt_embeddings``."""
    path = Path(path)
    if path.is_dir():
        return read_prompt(path)[0]
    if not path.is_file():
        raise ValueError(
            "`init` must be random, vocabulary, text, class_labels, a tensor, or the path of a prompt, "
            f"got {str(path)!r}"
        )
    return _read_tensor(path)


def _read_tensor(path: Path) -> Tensor:
    try:
        with safe_open(path, framework="pt") as file:
            keys = list(file.keys())
            key = KEY if KEY in keys else keys[0] if len(keys) == 1 else None
            if key is None:
                raise ValueError(f"{path} must hold one tensor, or one named {KEY!r}, got {keys}")
            values: Tensor = file.get_tensor(key)
    except SafetensorError as error:
        raise ValueError(f"{path} must be a safetensors file: {error}") from error
    if not values.is_floating_point() or not torch.isfinite(values).all():
        raise ValueError(f"{path}: `{key}` must be finite floating-point numbers")
    return values.float()
