"""What Trainer, pipelines and other clients read of a transformers model, passed on to the frozen base model."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from ..hf import architecture
from ..hf.adapters import adapter_parameters
from ..hf.embedding import own_embedding, vectors_like
from ..hf.freezing import Claim, freeze, keep_trainable, train
from ..hf.heads import head_parameters, head_state, path_inside
from .fused_head import TakesFusedHead
from .head_users import head_changed, leave_head, use_head
from .trained_head import trained_head

logger = logging.getLogger("softprompt_fast")
BASE_PREFIX = "base_model."
COMPARING = {"dpo", "kto"}
"""Tags of TRL's trainers that always need a reference model."""


class ModelInterface(TakesFusedHead):
    """Holds a frozen base model. Its ``state_dict`` holds everything but the frozen weights.

    Args:
        model: a transformers model; its parameters are frozen until the last object that froze them is gone.
        train_head: as :class:`SoftPromptModel` takes it.
        train_adapters: whether the trainable parameters of PEFT's adapters in the model stay trainable.
    """

    head_modules: tuple[str, ...]
    """The names of the modules that the model's class adds to its backbone; empty for language models."""
    trains_head: bool
    """Whether these modules are trained with the prompts."""

    def __init__(self, model: Any, *, train_head: bool | None = None, train_adapters: bool = False) -> None:
        super().__init__()
        model = architecture.compiled_in_place(model)
        architecture.check_supported(model)
        self.head_modules, self.trains_head = trained_head(model, train_head, train_adapters=train_adapters)
        self.saves_head = self.trains_head
        """Whether prompts are saved with the head: it is trained, or it came with a prompt."""
        self.train_adapters = train_adapters
        if train_adapters and not any(parameter.requires_grad for parameter in adapter_parameters(model)):
            raise ValueError(
                "`train_adapters` must be False because no parameter of an adapter is trainable: load the adapter with "
                "is_trainable=True, before another object freezes the model"
            )
        self.base_model: Any = model
        use_head(model, self)
        self._trained: list[Claim] = []
        self._frozen: list[Claim] | None = self._freeze()
        """None: :meth:`unload` was called."""
        self.model_tags: list[str] | None = None
        """Words for a model card, which trainers add."""
        self.warnings_issued: dict[str, bool] = {}
        """Warnings that trainers have given about this model."""
        self.has_reference = False
        """Whether a reference model shares the base."""
        self.register_state_dict_post_hook(_drop_frozen_weights)
        self.register_load_state_dict_post_hook(_allow_missing_base)

    def _freeze(self) -> list[Claim]:
        """Freezes all parameters that are not to be trained."""
        self._trained = self._keep_trained()
        return freeze(self.base_model.parameters())

    def set_adapter(self, adapter: str | Sequence[str]) -> None:
        """Makes one of the adapters (LoRA and others) in the base model the active one, or several.

        PEFT's own method also makes the adapter trainable. After this one it is trainable only with
        ``train_adapters=True``.
        """
        self._check_adapters()
        self.base_model.set_adapter(adapter if isinstance(adapter, str) else list(adapter))
        self._frozen = self._freeze()

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """Runs the base model without the adapters in its layers; prompts still run. As PEFT's method of this name."""
        self._check_adapters()
        base = self.base_model
        try:
            if hasattr(base, "disable_adapter"):
                with base.disable_adapter():
                    yield
            else:  # transformers' own adapters
                base.disable_adapters()
                try:
                    yield
                finally:
                    base.enable_adapters()
        finally:  # PEFT leaves the active adapter trainable
            if self._frozen is not None:
                self._frozen = self._freeze()

    def _check_adapters(self) -> None:
        self._check_loaded()
        if next(adapter_parameters(self.base_model), None) is None:
            raise TypeError(f"{type(self.base_model).__name__} has no adapters")

    def get_base_model(self) -> Any:
        """The model that was given."""
        return self.base_model

    def unload(self) -> Any:
        """Releases the parameters and returns the base model."""
        leave_head(self.base_model, self)
        self._frozen, self._trained = None, []
        return self.base_model

    def _keep_trained(self) -> list[Claim]:
        """What is trained in the base model: its head, and adapters."""
        trained = train(head_parameters(self.base_model, self.head_modules)) if self.trains_head else []
        return trained + (keep_trainable(adapter_parameters(self.base_model)) if self.train_adapters else [])

    def _own_head(self, modules: tuple[str, ...]) -> None:
        """Saves these modules with the prompts, and trains them if the head is trained."""
        self.head_modules = tuple(dict.fromkeys(self.head_modules + modules))
        self.saves_head = True
        self._trained = self._keep_trained()

    def _check_loaded(self) -> None:
        if self._frozen is None:
            raise RuntimeError(f"this {type(self).__name__} was unloaded; make a new one to run its prompts")

    # A copy or another process freezes its own parameters, so that they can be released there.

    def __getstate__(self) -> dict[str, Any]:
        if self._frozen is None:
            return self.__dict__.copy()
        ours = {id(frozen.parameter) for frozen in self._frozen if frozen.own}
        names = [name for name, parameter in self.base_model.named_parameters() if id(parameter) in ours]
        return self.__dict__ | {"_frozen": names, "_trained": [], "_head_changed": head_changed(self.base_model)}

    def __setstate__(self, state: dict[str, Any]) -> None:
        changed = state.pop("_head_changed", False)
        super().__setstate__(state)
        if self._frozen is not None:
            use_head(self.base_model, self, changed=changed)
            names = set(state["_frozen"])
            parameters = [parameter for name, parameter in self.base_model.named_parameters() if name in names]
            for parameter in parameters:
                parameter.requires_grad_(True)
            self._trained = self._keep_trained()
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
        device: torch.device = vectors_like(self.get_input_embeddings()).device
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
        skipped = {id(own_embedding(self.get_input_embeddings()).weight)} if exclude_embeddings else set()
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

    # --- training helpers that trainers look for ---

    def add_model_tags(self, tags: Sequence[str] | str) -> None:
        """Adds words for a model card. TRL's trainers do so when they have loaded all that they need."""
        added = [tags] if isinstance(tags, str) else tags
        if COMPARING & set(added) and not self.has_reference:
            logger.warning(
                "the trainer has loaded a second copy of the base to compare with, or compares with the prompt as it "
                "is now: give ref_model=softprompt_fast.interop.reference_model(model) to share the base"
            )
        self.model_tags = list(dict.fromkeys([*(self.model_tags or []), *added]))

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
    """Adapters and a head that are trained inside the base model stay, and a head that came with a prompt."""
    start = prefix + BASE_PREFIX
    kept = {start + name for name, p in module.base_model.named_parameters() if p.requires_grad}
    if module.saves_head:
        inside = start + path_inside(module.base_model)
        kept |= {inside + name for name in head_state(module.base_model, module.head_modules)}
    for key in [key for key in state if key.startswith(start) and key not in kept]:
        del state[key]


def _allow_missing_base(module: ModelInterface, incompatible: Any) -> None:
    base = set(module.base_model.state_dict())
    missing = incompatible.missing_keys
    missing[:] = [key for key in missing if key.rpartition(BASE_PREFIX)[2] not in base or BASE_PREFIX not in key]
