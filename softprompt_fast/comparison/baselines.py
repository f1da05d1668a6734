"""The methods that other libraries bring: PEFT's prompt tuning and LoRA, full fine-tuning."""

from __future__ import annotations

import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.extras import require
from ..base.files import size_of
from ..evaluation.likelihood import Backend
from ..hf.dtype import choose_dtype
from ..models.soft_prompt_model import SoftPromptModel
from ..tuning.objective import choose_loss
from .backends import Packed, PeftPrompt, Plain
from .encoding import Encoder
from .loop import Trained, train
from .scores import score_rows
from .work import Ready, Work

BEST = "best.safetensors"


def peft_prompt(work: Work) -> Ready:
    """PEFT's PromptTuning, its own initialisation and forward call."""
    peft = import_peft()
    torch.manual_seed(work.job.seed)
    count = int(work.options["num_virtual_tokens"])
    with tempfile.TemporaryDirectory() as folder:
        facts: dict[str, Any] = {}
        if work.options["init"] == "TEXT":
            work.tokenizer.save_pretrained(folder)  # PEFT reads it from a folder
            facts = {"prompt_tuning_init_text": work.options["init_text"], "tokenizer_name_or_path": folder}
        config = peft.PromptTuningConfig(
            task_type="CAUSAL_LM", num_virtual_tokens=count, prompt_tuning_init=work.options["init"], **facts
        )
        model = peft.get_peft_model(work.model, config)
    backend = PeftPrompt(model, work.tokenizer, count)
    trained = _train(work, model, backend, lambda: _save_adapter(model, work.artifacts))
    _load_adapter(model, work.artifacts)
    return _ready(work, trained, model, backend, size_of(work.artifacts), prefix_tokens=count)


def lora(work: Work) -> Ready:
    """PEFT's LoRA; adapters in float32, which is PEFT's own rule for half-precision models."""
    peft = import_peft()
    torch.manual_seed(work.job.seed)
    options = work.options
    config = peft.LoraConfig(
        task_type="CAUSAL_LM",
        r=int(options["r"]),
        lora_alpha=options["alpha"],
        lora_dropout=float(options["dropout"]),
        target_modules=options["target_modules"],
        bias="none",
    )
    model = peft.get_peft_model(work.model, config)
    trained = _train(work, model, Plain(model, work.tokenizer), lambda: _save_adapter(model, work.artifacts))
    _load_adapter(model, work.artifacts)
    count = _trainable(model)
    backend = Packed(SoftPromptModel(model.get_base_model()))
    ready = _ready(work, trained, model, backend, size_of(work.artifacts))
    ready.trainable_parameters = count
    return ready


def full(work: Work) -> Ready:
    """All weights in float32, products in bfloat16 where the model came in half precision and the machine has it."""
    model = work.model
    dtype = model.dtype
    _cast_weights(model, torch.float32)
    model.requires_grad_(True)
    autocast = torch.bfloat16 if dtype != torch.float32 and _computes_in_bfloat16(model) else None
    work.artifacts.mkdir(parents=True, exist_ok=True)
    best = work.artifacts / BEST
    torch.manual_seed(work.job.seed)
    plain = Plain(model, work.tokenizer, autocast)
    trained = _train(work, model, plain, lambda: _save_weights(model, best))
    _load_weights(model, best)
    shutil.rmtree(work.artifacts)
    count = _trainable(model)
    _cast_weights(model, dtype)  # as it would be stored and served
    stored = sum(p.numel() * p.element_size() for p in model.parameters())
    ready = _ready(work, trained, model, Packed(SoftPromptModel(model)), stored)
    ready.trainable_parameters = count
    ready.detail["autocast"] = str(autocast).removeprefix("torch.")
    return ready


def import_peft() -> Any:
    require("compare", "peft", purpose="this method")
    import peft

    return peft


def _train(work: Work, model: Any, backend: Backend, keep: Any) -> Trained:
    encoder = Encoder(work.task, work.tokenizer)
    rows = work.splits["train"]
    texts, targets = encoder.texts(rows), encoder.targets(rows)
    loss = choose_loss("labels", work.task, work.tokenizer)

    def step_loss(indices: Sequence[int]) -> Tensor:
        chosen = [targets[i] for i in indices]
        logits = backend.target_logits([texts[i] for i in indices], chosen)
        tokens = torch.tensor([token for target in chosen for token in target], device=logits.device)
        rows = torch.tensor([row for row, target in enumerate(chosen) for _ in target], device=logits.device)
        return loss(logits, tokens, rows)

    return train(
        model,
        step_loss,
        [len(text) + len(target) for text, target in zip(texts, targets, strict=True)],
        lambda: score_rows(backend, encoder, work.splits["validation"], work.job.batch_size),
        keep,
        work.options,
        work.job.batch_size,
        work.job.seed,
    )


def _ready(
    work: Work, trained: Trained, model: Any, backend: Backend, stored: int, prefix_tokens: float = 0.0
) -> Ready:
    encoder = Encoder(work.task, work.tokenizer)
    return Ready(
        lambda rows: score_rows(backend, encoder, rows, work.job.batch_size),
        prefix_tokens=prefix_tokens,
        trainable_parameters=_trainable(model),
        stored_bytes=stored,
        train_seconds=trained.train_seconds,
        evaluation_seconds=trained.evaluation_seconds,
        detail={"best step": trained.best_step, "validation": trained.history},
    )


def _trainable(model: Any) -> int:
    return sum(p.numel() for p in model.parameters() if p.requires_grad)


def _save_adapter(model: Any, folder: Path) -> None:
    model.save_pretrained(str(folder), save_embedding_layers=False)
    readme = folder / "README.md"
    readme.unlink(missing_ok=True)  # PEFT's model card; not needed to serve


def _load_adapter(model: Any, folder: Path) -> None:
    from peft import set_peft_model_state_dict
    from safetensors.torch import load_file

    set_peft_model_state_dict(model, load_file(folder / "adapter_model.safetensors"))


def _save_weights(model: Any, path: Path) -> None:
    from safetensors.torch import save_file

    save_file({name: p.detach().contiguous() for name, p in model.named_parameters()}, path)


@torch.no_grad()
def _load_weights(model: Any, path: Path) -> None:
    from safetensors import safe_open

    with safe_open(path, framework="pt") as file:
        for name, parameter in model.named_parameters():
            parameter.copy_(file.get_tensor(name))


@torch.no_grad()
def _cast_weights(model: Any, dtype: torch.dtype) -> None:
    """In place: ``model.float()`` refuses models that came from quantised files. Tied weights stay tied."""
    for parameter in model.parameters():
        parameter.data = parameter.data.to(dtype)


def _computes_in_bfloat16(model: Any) -> bool:
    """Whether the device has bfloat16; a CPU, whether it is the faster dtype there."""
    if model.device.type == "cpu":
        return choose_dtype(model.config).dtype == torch.bfloat16
    return model.device.type != "cuda" or torch.cuda.is_bf16_supported()
