"""Prompts on disk: PEFT's adapter folders (``adapter_config.json``, ``adapter_model.safetensors``). No pickle.

The tensor of a prompt is ``prompt_embeddings``, in float32:

* plain prompts: ``[P, D]``. P-tuning and CPT store the vectors that they computed. PEFT's own encoder-decoder prompts
  hold ``[2 P, D]``; its forward pass reads the first P rows, and so do we. For several tasks in a folder see
  ``multitask_files.py``.
* deep prompts (prefix tuning, cartridges): ``[P, L * 2 * H' * E]``, each virtual token's key and value of the first
  layer, then of the second, and so on. A cartridge's first ``num_frozen_tokens`` are not trained.
* prompts with a token update (DePT): ``[P, D]``, and also ``token_update_a [U, r]`` and ``token_update_b [r, D]``. The
  ``peft_type`` is our own, so PEFT refuses them.
"""

from __future__ import annotations

import json
import logging
import re
from collections.abc import Collection, Mapping
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import either
from ..base.files import save_tensors_atomically, write_atomically
from ..base.hub import folder_name
from ..base.locations import located
from . import pickle_files
from .head_files import head_names, stored_names
from .multitask_files import MULTITASK, read_task_prompt, split_task, task_paths
from .tensor_files import FACTORS, KEY, read_header, read_tensor

logger = logging.getLogger("softprompt_fast")

NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,127}")
CONFIG_FILE = "adapter_config.json"
CONFIG_LIMIT = 1 << 20
"""Bytes of adapter_config.json."""
WEIGHTS_FILE = "adapter_model.safetensors"
PICKLE_FILE = "adapter_model.bin"
FINGERPRINT = "base_fingerprint"
"""Key of the metadata of the weights' file; adapter_config.json has only PEFT's keys, because PEFT warns of others."""
PLAIN, P_TUNING, CPT = "PROMPT_TUNING", "P_TUNING", "CPT"
DEEP, CARTRIDGE = "PREFIX_TUNING", "CARTRIDGE"
UPDATED = "SOFTPROMPT_FAST_DEPT"
PLAIN_TYPES = (PLAIN, P_TUNING, MULTITASK, CPT)
"""Methods whose prompts are vectors at the input."""
DEEP_TYPES = (DEEP, CARTRIDGE)
"""Methods whose prompts are keys and values of every layer."""


def is_prompt_folder(path: Path) -> bool:
    """Whether a path is an adapter folder, or a task of one."""
    folder, _ = split_task(path)
    return (folder / CONFIG_FILE).is_file() and (folder / WEIGHTS_FILE).is_file()


def weights_file(path: PathLike[str] | str) -> Path:
    """The file of weights of an adapter folder, or of a task of one."""
    return split_task(path)[0] / WEIGHTS_FILE


def safe_name(text: str) -> str:
    """The name of a prompt that any text gives: other characters than letters, digits, ``_`` and ``-`` become ``-``."""
    return re.sub(r"[^A-Za-z0-9_-]+", "-", text).strip("-")[:128] or "prompt"


def prompts_by_name(directory: PathLike[str] | str) -> dict[str, Path]:
    """The adapter folders of a directory, a version or a repository on the Hub, by the names of their prompts.

    The names are those of the folders, made safe. Task 2 of several in ``folder`` is ``folder-2``. The only prompt of a
    repository has the repository's name.

    Raises:
        FileNotFoundError: there are none.
    """
    folders = prompt_folders(directory)
    taken = {folder_name(folder) for folder in folders}
    found: dict[str, Path] = {}
    for folder in folders:
        own = folder_name(folder)
        name = own if NAME.fullmatch(own) else safe_name(own)
        count = 2
        while name in found or (name != own and name in taken):
            name, count = f"{safe_name(own)[:120]}-{count}", count + 1
        found[name] = folder
    renamed = [
        f"{folder_name(folder)!r} is {name!r}"
        for name, folder in found.items()
        if name not in taken and name != folder_name(folder).replace("#", "-")
    ]
    if renamed:
        logger.warning("prompts are named by letters, digits, '_' and '-': %s", ", ".join(renamed))
    return found


def prompt_folders(directory: PathLike[str] | str) -> list[Path]:
    """The directory itself if it is a prompt's folder, else all of them in it, sorted.

    The directory may also be a version in the registry or a repository on the Hub.

    A folder with several tasks is given once for each, as ``folder#0`` and so on. Other adapters (LoRA) beside prompts
    are left out.

    Raises:
        FileNotFoundError: there are none.
        ValueError: there are only pickles.
    """
    directory = located(directory)
    inside = sorted(directory.iterdir()) if directory.is_dir() else []
    here = [directory] if is_prompt_folder(directory) else []
    adapters = here or [folder for folder in inside if is_prompt_folder(folder)]
    if here and _is_other_adapter(directory):
        adapters += [folder for folder in inside if is_prompt_folder(folder)]
    # If there are only others, reading one of them gives the reason against it.
    prompts = [folder for folder in adapters if not _is_other_adapter(folder)] or adapters[:1]
    folders = [path for folder in prompts for path in _with_tasks(folder)]
    for folder in adapters:
        if folder not in prompts:
            logger.info("%s holds another adapter than a prompt and is left out", folder)
    if here:
        return folders
    pickles = [folder for folder in (directory, *inside) if _is_pickled(folder)]
    if not folders and pickles:
        raise pickle_files.refusal(pickles[0] / PICKLE_FILE)
    if not folders:
        only = ", got a file, which only `init` (--init), load_prompt and PromptBank.add read"
        found = only if directory.is_file() else ", but no prompt was found"
        raise FileNotFoundError(f"{directory} must be a PEFT adapter folder or hold some{found}")
    for folder in pickles:
        logger.warning("%s", pickle_files.refusal(folder / PICKLE_FILE))
    return folders


def _with_tasks(path: Path) -> list[Path]:
    """An adapter folder, or each of its tasks."""
    folder, task = split_task(path)
    try:
        config = read_config(folder, None)
    except ValueError:  # raised again when this prompt is read; others beside it can be
        return [path]
    if task is not None or config.get("peft_type") != MULTITASK:
        return [path]
    return task_paths(path, _integer(folder, config, "num_tasks", 1))


def _is_other_adapter(path: Path) -> bool:
    """Whether an adapter folder holds weights of a model's layers, such as LoRA's, and no prompt."""
    folder, _ = split_task(path)
    try:
        kind = read_config(folder, None).get("peft_type")
    except ValueError:  # raised again when the folder is read
        return False
    return kind not in (*PLAIN_TYPES, *DEEP_TYPES, UPDATED)


def _is_pickled(folder: Path) -> bool:
    """Whether a folder is an adapter's whose weights are only a pickle."""
    return (folder / CONFIG_FILE).is_file() and (folder / PICKLE_FILE).is_file() and not is_prompt_folder(folder)


def write_prompt(
    folder: PathLike[str] | str,
    prompt: Tensor,
    config: dict[str, Any],
    token_update: tuple[Tensor, Tensor] | None = None,
    *,
    kind: str = PLAIN,
    head: Mapping[str, Tensor] | None = None,
) -> None:
    """Writes an adapter folder; each file appears whole or not at all.

    Args:
        prompt: [P, D]
        config: the model's values of PEFT's fields (``task_type``, ``base_model_name_or_path``, ...), and its
            ``base_fingerprint``, which is written into the weights' file.
        token_update: the factors [U, r] and [r, D] of the prompt's token update, if it has one.
        kind: PLAIN, or P_TUNING, whose encoder PEFT needs only to train.
        head: tensors of the model that were trained with the prompt, by their names in the model. `config` then names
            their modules in ``modules_to_save``.

    Raises:
        ValueError: another kind than PLAIN for a prompt with a token update.
    """
    initial = {"prompt_tuning_init": "RANDOM", "prompt_tuning_init_text": None}
    tokenizer = {"tokenizer_name_or_path": None, "tokenizer_kwargs": None}
    encoder = {"encoder_reparameterization_type": "MLP", "encoder_num_layers": 2, "encoder_dropout": 0.0}
    fields: dict[str, Any] = {"peft_type": kind, "token_dim": prompt.shape[1]}
    fields |= encoder | {"encoder_hidden_size": prompt.shape[1]} if kind == P_TUNING else initial | tokenizer
    tensors = {KEY: prompt}
    if token_update is not None and kind != PLAIN:
        raise ValueError(f"`peft_type` {kind} cannot be written for a prompt with a token update")
    if token_update is not None:
        reach, rank = token_update[0].shape
        fields |= {"peft_type": UPDATED, "token_update_length": reach, "token_update_rank": rank}
        tensors |= dict(zip(FACTORS, token_update, strict=True))
    _write(Path(folder), tensors | stored_names(head or {}), fields | config)


def write_prefix(
    folder: PathLike[str] | str,
    prompt: Tensor,
    shape: tuple[int, int, int, int],
    config: dict[str, Any],
    *,
    frozen: int | None = None,
) -> None:
    """Writes a deep prompt [P, L * 2 * H' * E] as PEFT does.

    Args:
        shape: (L, 2, H', E)
        config: as in :func:`write_prompt`.
        frozen: of a cartridge: how many of its first positions are not trained. None: a prefix, which does not say it.
    """
    layers, _, heads, size = shape
    fields: dict[str, Any] = {
        "num_layers": layers,
        "num_attention_heads": heads,  # of keys, as PEFT writes them for grouped queries
        "token_dim": heads * size,
    }
    if frozen is None:
        fields |= {"peft_type": DEEP, "encoder_hidden_size": heads * size, "prefix_projection": False}
    else:
        fields |= {"peft_type": CARTRIDGE, "num_frozen_tokens": frozen}
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


def read_base(path: PathLike[str] | str) -> tuple[str | None, str | None]:
    """Name and fingerprint of the base model of an adapter folder, as far as they are known; of a file neither is."""
    folder, _ = split_task(path)
    if folder.is_file():
        return None, None
    name = read_config(folder, None).get("base_model_name_or_path")
    return name or None, read_header(folder / WEIGHTS_FILE)[1].get(FINGERPRINT)


def peft_type(folder: PathLike[str] | str) -> str:
    """The method of an adapter folder, in PEFT's words; raises as :func:`read_prompt` does."""
    return str(read_config(folder, None).get("peft_type"))


def is_deep(folder: PathLike[str] | str) -> bool:
    """Whether an adapter folder holds keys and values of every layer; raises as :func:`read_prompt` does."""
    return peft_type(folder) in DEEP_TYPES


def frozen_tokens(folder: PathLike[str] | str) -> int:
    """How many of the first positions of an adapter folder's prompt are not trained."""
    config = read_config(folder, None)
    return _integer(folder, config, "num_frozen_tokens", 1) if config.get("peft_type") == CARTRIDGE else 0


def read_config(path: PathLike[str] | str, kinds: tuple[str, ...] | None = PLAIN_TYPES) -> dict[str, Any]:
    """The configuration of an adapter folder; raises as :func:`read_prompt` does.

    Args:
        kinds: the `peft_type` must be one of them; None: any.
    """
    folder, _ = split_task(path)
    config = _read_json(folder)
    method = config.get("peft_type")
    if kinds is not None and method not in kinds and method == UPDATED:
        raise ValueError(
            f"{folder}: the prompt has a token update, which only SoftPromptModel.load_prompt and from_pretrained read"
        )
    if kinds is not None and method not in kinds:
        others = dict.fromkeys(DEEP_TYPES, "DeepPromptModel") | dict.fromkeys(PLAIN_TYPES, "SoftPromptModel")
        reader = f", which {others[method]} reads" if method in others else ""
        raise ValueError(f"{folder / CONFIG_FILE}: `peft_type` must be {either(kinds)}, got {method!r}{reader}")
    return config


def _read_json(folder: Path) -> dict[str, Any]:
    if _is_pickled(folder):
        raise pickle_files.refusal(folder / PICKLE_FILE)
    if not is_prompt_folder(folder):
        raise FileNotFoundError(f"{folder} is not a folder with {CONFIG_FILE} and {WEIGHTS_FILE}")
    path = folder / CONFIG_FILE
    if path.stat().st_size > CONFIG_LIMIT:
        raise ValueError(f"{path} must have at most {CONFIG_LIMIT} bytes, got {path.stat().st_size}")
    try:
        config = json.loads(path.read_text())
    except (ValueError, RecursionError) as error:
        raise ValueError(f"{path} must be JSON: {error}") from error
    if not isinstance(config, dict):
        raise ValueError(f"{path} must be a JSON object, got {type(config).__name__}")
    return config


def _integer(folder: PathLike[str] | str, config: dict[str, Any], field: str, default: int) -> int:
    """A number of a configuration."""
    value = config.get(field, default)
    value = default if value is None else value
    if not isinstance(value, int) or value < 0:
        raise ValueError(f"{Path(folder) / CONFIG_FILE}: `{field}` must be a number from 0, got {value!r}")
    return value


def read_prompt(path: PathLike[str] | str, *, loaded: Collection[str] = ()) -> tuple[Tensor, dict[str, Any]]:
    """The prompt [P, D] (float32) and the configuration of an adapter folder, a task of one, or a version.

    Args:
        loaded: names of tensors of the model, its head, that the caller reads; one log line names others.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: its method has no vectors at the input, or its tensor does not fit its configuration or is not
            finite; the folder has several tasks and none is named.
    """
    path = located(path)
    config = read_config(path)
    return _read_prompt(path, config, loaded), config


def read_updated_prompt(
    folder: PathLike[str] | str, *, loaded: Collection[str] = ()
) -> tuple[Tensor, tuple[Tensor, Tensor], dict[str, Any]]:
    """The prompt [P, D], the factors [U, r] and [r, D] of its token update (float32) and the configuration of a folder.

    Args:
        loaded: as in :func:`read_prompt`.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: not a prompt with a token update, or a tensor does not fit the others or is not finite.
    """
    folder = Path(folder)
    config = read_config(folder, (UPDATED,))
    prompt = _read_prompt(folder, config, loaded)
    a, b = (read_tensor(folder / WEIGHTS_FILE, key) for key in FACTORS)
    reach, rank = (config.get(f"token_update_{field}") for field in ("length", "rank"))
    if list(a.shape) != [reach, rank] or list(b.shape) != [rank, prompt.shape[1]]:
        raise ValueError(
            f"{folder / WEIGHTS_FILE}: `{FACTORS[0]}` and `{FACTORS[1]}` must have shapes {[reach, rank]} and "
            f"{[rank, prompt.shape[1]]}, got {list(a.shape)} and {list(b.shape)}"
        )
    return prompt, (a, b), config


def _read_prompt(path: Path, config: dict[str, Any], loaded: Collection[str]) -> Tensor:
    folder, task = split_task(path)
    weights, kind = folder / WEIGHTS_FILE, config.get("peft_type")
    if task is not None and kind != MULTITASK:
        raise ValueError(f"{path} names a task, but {folder} holds one prompt, of type {kind}")
    _say_what_is_left(folder, loaded)
    if kind == MULTITASK:
        values = read_task_prompt(folder, weights, task)
    else:
        values = read_tensor(weights, KEY if kind == UPDATED else None)
    count = _integer(folder, config, "num_virtual_tokens", 0)
    submodules = _integer(folder, config, "num_transformer_submodules", 1)
    if kind == MULTITASK and submodules > 1:
        raise ValueError(
            f"{folder}: num_transformer_submodules must be 1, got {submodules}: the second half of such prompts is for "
            "the decoder, which gets none here"
        )
    if values.dim() != 2 or not count or len(values) not in (count, count * submodules):
        raise ValueError(f"{weights}: `{KEY}` must have num_virtual_tokens={count} rows, got {list(values.shape)}")
    return values[:count].contiguous()


def _say_what_is_left(folder: Path, loaded: Collection[str] = ()) -> None:
    """Logs weights of the model, such as a head, that were saved with a prompt and are not loaded."""
    others = [f"base_model.{name}" for name in head_names(folder / WEIGHTS_FILE) if name not in loaded]
    if others:
        logger.warning(
            "%s also holds %s, which belong to the model and are not loaded; give the model these weights first",
            folder / WEIGHTS_FILE,
            others,
        )


def read_prefix(folder: PathLike[str] | str, shape: tuple[int, int, int, int]) -> tuple[Tensor, dict[str, Any]]:
    """The deep prompt [P, L * 2 * H' * E] (float32) and the configuration of an adapter folder: a prefix or cartridge.

    Args:
        shape: (L, 2, H', E) of the model's keys and values.

    Raises:
        FileNotFoundError: no such folder.
        ValueError: another method, made for a model of another shape, or its numbers are not finite.
    """
    folder = Path(folder)
    config = read_config(folder, DEEP_TYPES)
    if config.get("num_transformer_submodules") == 2:
        raise ValueError(f"{folder}: the prompt is for an encoder-decoder, and deep prompts run in decoders only")
    _say_what_is_left(folder)
    values = read_tensor(folder / WEIGHTS_FILE)
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
    if frozen_tokens(folder) > len(values):
        raise ValueError(
            f"{folder / CONFIG_FILE}: `num_frozen_tokens` must be at most {count}, got {frozen_tokens(folder)}"
        )
    return values.contiguous(), config
