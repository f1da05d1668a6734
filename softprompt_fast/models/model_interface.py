"""What Trainer, pipelines and other clients read of a transformers model, passed on to the frozen base model."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from ..hf import architecture
from ..hf.freezing import Frozen, Trained, freeze, train
from ..hf.heads import head_parameters
from .trained_head import trained_head

BASE_PREFIX = "base_model."


class ModelInterface(nn.Module):
    """Holds a frozen base model. Its ``state_dict`` holds everything but the frozen weights.

    Args:
        model: a transformers model; its parameters are frozen until the last object that froze them is gone.
        train_head: as :class:`SoftPromptModel` takes it.
    """

    head_modules: tuple[str, ...]
    """The names of the modules that the model's class adds to its backbone; empty for language models."""
    trains_head: bool
    """Whether these modules are trained with the prompts."""

    def __init__(self, model: Any, *, train_head: bool | None = None) -> None:
        super().__init__()
        model = architecture.compiled_in_place(model)
        architecture.check_supported(model)
        self.head_modules, self.trains_head = trained_head(model, train_head)
        self.saves_head = self.trains_head
        """Whether prompts are saved with the head: it is trained, or it came with a prompt."""
        self._trained: list[Trained] = self._train_head(model)
        self._frozen: list[Frozen] | None = freeze(model.parameters())
        """None: :meth:`unload` was called."""
        self.base_model: Any = model
        self.register_state_dict_post_hook(_drop_frozen_weights)
        self.register_load_state_dict_post_hook(_allow_missing_base)

    def get_base_model(self) -> Any:
        """The model that was given."""
        return self.base_model

    def unload(self) -> Any:
        """Releases the parameters and returns the base model."""
        self._frozen, self._trained = None, []
        return self.base_model

    def _train_head(self, model: Any) -> list[Trained]:
        return train(head_parameters(model, self.head_modules) if self.trains_head else ())

    def _own_head(self, modules: tuple[str, ...]) -> None:
        """Saves these modules with the prompts, and trains them if the head is trained."""
        self.head_modules = tuple(dict.fromkeys(self.head_modules + modules))
        self.saves_head = True
        self._trained = self._train_head(self.base_model)

    def _check_loaded(self) -> None:
        if self._frozen is None:
            raise RuntimeError(f"this {type(self).__name__} was unloaded; make a new one to run its prompts")

    # A copy or another process freezes its own parameters, so that they can be released there.

    def __getstate__(self) -> dict[str, Any]:
        if self._frozen is None:
            return self.__dict__.copy()
        ours = {id(frozen.parameter) for frozen in self._frozen}
        names = [name for name, parameter in self.base_model.named_parameters() if id(parameter) in ours]
        return self.__dict__ | {"_frozen": names, "_trained": []}

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        if self._frozen is not None:
            names = set(state["_frozen"])
            parameters = [parameter for name, parameter in self.base_model.named_parameters() if name in names]
            for parameter in parameters:
                parameter.requires_grad_(True)
            self._trained = self._train_head(self.base_model)
            self._frozen = freeze(parameters)

    # --- facts ---

    @property
    def config(self) -> Any:
        """The base model's configuration."""
        return self.base_model.config

    @property
    def generation_config(self) -> Any:
        """The base model's generation configuration; None: it generates no text."""
        return getattr(self.base_model, "generation_config", None)

    @generation_config.setter
    def generation_config(self, value: Any) -> None:
        self.base_model.generation_config = value

    @property
    def device(self) -> torch.device:
        device: torch.device = self.base_model.get_input_embeddings().weight.device
        return device

    @property
    def dtype(self) -> torch.dtype:
        dtype: torch.dtype = self.base_model.dtype
        return dtype

    @property
    def name_or_path(self) -> str:
        return getattr(self.base_model, "name_or_path", "")

    @property
    def main_input_name(self) -> str:
        return "input_ids"

    @property
    def prepare_decoder_input_ids_from_labels(self) -> Any:
        """The encoder-decoder's own method, which transformers' collators call; other models have none."""
        return self.base_model.prepare_decoder_input_ids_from_labels

    def can_generate(self) -> bool:
        return bool(getattr(self.base_model, "can_generate", lambda: False)())

    def get_input_embeddings(self) -> nn.Module:
        embedding: nn.Module = self.base_model.get_input_embeddings()
        return embedding

    def get_output_embeddings(self) -> nn.Module | None:
        head: nn.Module | None = self.base_model.get_output_embeddings()
        return head

    def num_parameters(self, only_trainable: bool = False, exclude_embeddings: bool = False) -> int:
        """Numbers in the base model and the prompts."""
        skipped = {id(self.get_input_embeddings().weight)} if exclude_embeddings else set()
        parameters = (p for p in self.parameters() if id(p) not in skipped and (p.requires_grad or not only_trainable))
        return sum(parameter.numel() for parameter in parameters)

    def _get_name(self) -> str:
        """Trainer's label smoothing shifts the labels of models whose class has a causal language model's name."""
        from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

        names = set(MODEL_FOR_CAUSAL_LM_MAPPING_NAMES.values())
        own = [owner.__name__ for owner in type(architecture.without_adapters(self.base_model)).__mro__]
        if architecture.ForwardTraits.of(self.base_model).predicts_next_token:
            return next((name for name in own if name in names), "LlamaForCausalLM")
        return type(self).__name__

    def __repr__(self) -> str:
        return super().__repr__().replace(self._get_name(), type(self).__name__, 1)

    # --- training helpers that Trainer looks for ---

    @property
    def is_gradient_checkpointing(self) -> bool:
        return bool(getattr(self.base_model, "is_gradient_checkpointing", False))

    def gradient_checkpointing_enable(
        self, gradient_checkpointing_kwargs: dict[str, Any] | None = None, **options: Any
    ) -> None:
        self.base_model.gradient_checkpointing_enable(gradient_checkpointing_kwargs, **options)

    def gradient_checkpointing_disable(self) -> None:
        self.base_model.gradient_checkpointing_disable()

    def enable_input_require_grads(self) -> None:
        self.base_model.enable_input_require_grads()

    def disable_input_require_grads(self) -> None:
        self.base_model.disable_input_require_grads()


def _drop_frozen_weights(module: ModelInterface, state: dict[str, Any], prefix: str, metadata: Any) -> None:
    """Adapters and a head that are trained inside the base model stay."""
    start = prefix + BASE_PREFIX
    trained = {start + name for name, p in module.base_model.named_parameters() if p.requires_grad}
    for key in [key for key in state if key.startswith(start) and key not in trained]:
        del state[key]


def _allow_missing_base(module: ModelInterface, incompatible: Any) -> None:
    base = set(module.base_model.state_dict())
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if key.rpartition(BASE_PREFIX)[2] not in base or BASE_PREFIX not in key]
