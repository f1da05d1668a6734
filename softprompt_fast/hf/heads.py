"""The head of a model: the modules of its class that are not its backbone, and whether they were ever trained."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from .architecture import classifies_rows, without_adapters

LOADED = "_is_hf_initialized"
"""Attribute that transformers gives each parameter that it read from a checkpoint. A copied model has lost it."""


def head_modules(model: Any) -> tuple[str, ...]:
    """The names of a model's head: what its class adds to its backbone, such as ``score`` or ``qa_outputs``.

    Empty: the model has no head, or one for language modelling. The pooler of a backbone that classifies rows
    (``bert.pooler``) counts if its weights are new, as they are if the checkpoint is of a masked language model. A head
    that PEFT trains by itself does not count.
    """
    model = without_adapters(model)
    if model.get_output_embeddings() is not None or getattr(model, "base_model", model) is model:
        return ()
    embedding = model.get_input_embeddings()
    names = [name for name, child in model.named_children() if _is_of_head(child, embedding)]
    if classifies_rows(model):
        names += [name for name in _poolers(model) if is_fresh(model, (name,))]
    return tuple(names)


def heads_of_peft(model: Any) -> tuple[str, ...]:
    """The names of a model's head modules that PEFT trains by itself (``modules_to_save``), and would train now."""
    model = without_adapters(model)
    if model.get_output_embeddings() is not None or getattr(model, "base_model", model) is model:
        return ()
    saved = {name: getattr(child, "modules_to_save", None) for name, child in model.named_children()}
    return tuple(
        name
        for name, copies in saved.items()
        if copies is not None and any(p.requires_grad for p in copies.parameters())
    )


def is_fresh(model: Any, names: tuple[str, ...]) -> bool | None:
    """Whether weights of these modules are random because no checkpoint held them; None: that cannot be known."""
    model = without_adapters(model)
    if any(getattr(parameter, LOADED, False) for parameter in model.parameters()):
        return not all(getattr(parameter, LOADED, False) for parameter in head_parameters(model, names))
    return None if getattr(model, "name_or_path", "") else True


def head_parameters(model: Any, names: tuple[str, ...]) -> list[nn.Parameter]:
    """The parameters of the modules of these names."""
    model = without_adapters(model)
    return [parameter for name in names for parameter in model.get_submodule(name).parameters()]


def head_state(model: Any, names: tuple[str, ...]) -> dict[str, Tensor]:
    """The tensors of the modules of these names, by their names in the model."""
    model = without_adapters(model)
    return {f"{name}.{key}": value for name in names for key, value in model.get_submodule(name).state_dict().items()}


def path_inside(model: Any) -> str:
    """What the names of a model's tensors begin with in the PEFT model around it; empty: there is none."""
    inner = without_adapters(model)
    path = next(name for name, module in model.named_modules() if module is inner)
    return f"{path}." if path else ""


def loadable_modules(model: Any) -> tuple[str, ...]:
    """The modules whose weights may come with a prompt: the head, and the pooler of a backbone that classifies rows."""
    names = head_modules(model)
    model = without_adapters(model)
    poolers = _poolers(model) if names and classifies_rows(model) else []
    return names + tuple(name for name in poolers if name not in names)


def _is_of_head(child: nn.Module, embedding: nn.Module) -> bool:
    if hasattr(child, "modules_to_save") or not _has_weights(child):
        return False
    return not any(module is embedding for module in child.modules())


def _poolers(model: Any) -> list[str]:
    """The names of poolers of a model's backbone."""
    prefix = model.base_model_prefix
    children = getattr(model, prefix, nn.Module()).named_children()
    return [
        f"{prefix}.{name}" for name, child in children if "pooler" in name and any(True for _ in child.parameters())
    ]


def _has_weights(module: nn.Module) -> bool:
    return any(True for _ in module.parameters())
