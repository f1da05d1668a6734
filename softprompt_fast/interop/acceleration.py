"""``accelerate``: a PEFT model with a prompt runs on this library's layouts, in place.

The model's class is replaced by a subclass, so that ``isinstance``, ``copy``, ``pickle`` and PEFT's own methods work as
before. Nothing is registered in the model: parameters, ``state_dict`` and saved files stay PEFT's.
"""

from __future__ import annotations

import inspect
import logging
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cache, wraps
from typing import Any

import torch
from torch import Tensor

from ..hf import generation_options
from ..hf.architecture import pools_last_token
from ..hf.randomness import draws_random_numbers
from ..models.deep_prompt_model import DeepPromptModel
from ..models.soft_prompt_model import SoftPromptModel
from ..packed.runner import PACKED_OPTIONS, ExecutionReport
from ..prompts.fast_soft_prompt import FastSoftPrompt
from .adapters import TASKS, active_prompt, check_adapters, inferred_mask, is_prefix, padding_differs
from .lazy_logits import with_lazy_logits

logger = logging.getLogger("softprompt_fast")
COMPATIBILITY = ("correct", "exact")
STATE = "_softprompt_fast"
"""Attribute of an accelerated model: its :class:`Acceleration`."""
LEFT_TO_PEFT = ("past_key_values", "encoder_outputs", "adapter_names")
"""Arguments of a call that only PEFT's own code understands."""
PATCHED = ("forward", "prepare_inputs_for_generation")
"""Methods that PEFT's ``disable_adapter`` leaves on the instance."""


@dataclass
class Acceleration:
    """How one PEFT model runs."""

    compat: str
    runner: Any
    """A SoftPromptModel or DeepPromptModel over the PEFT model's base model."""
    reads_logits: bool = False
    """Whether the caller has read logits of a training batch: they are then computed with every loss."""
    reported: set[str] = field(default_factory=set)

    @property
    def refusal(self) -> str | None:
        """Why prefixes cannot run here, as the first batch has shown; None: they can."""
        return self.runner.runner.unsupported if isinstance(self.runner, DeepPromptModel) else None


def accelerate(peft_model: Any, *, compat: str = "correct", cuda_graphs: bool = True) -> Any:
    """Makes a PEFT model with a prompt run on this library's layouts, in place, and returns it.

    The same object with the same parameters runs faster: ``model = softprompt_fast.accelerate(get_peft_model(...))``.
    Training loops, optimisers, Trainer, ``save_pretrained``, ``generate``, ``set_adapter`` and ``disable_adapter`` work
    as before. Logits keep PEFT's shape, [B, P + T, V] after a prompt of P vectors. Of the prompt's columns only the one
    before a row's first token is sure to be computed; others may be zero. What this library cannot run, such as a
    batch with ``past_key_values``, PEFT runs, with one log line.

    Args:
        peft_model: a PEFT model for causal or sequence-to-sequence language modelling, sequence classification, token
            classification or question answering, with prompt tuning or P-tuning; with prefix tuning or cartridges for
            causal language modelling.
        compat: what to do where PEFT's result depends on padding, or where PEFT misplaces labels:

            * "correct": each row gets the result it would get alone.
            * "exact": PEFT's own forward runs such batches.
        cuda_graphs: as for :class:`SoftPromptModel`. A batch that ran as a CUDA graph has one backward pass.

    Raises:
        TypeError: the model cannot be accelerated, with the reason; nothing has been changed.
        ValueError: an unknown `compat`.
    """
    if compat not in COMPATIBILITY:
        raise ValueError(f"`compat` must be one of {', '.join(COMPATIBILITY)}, got {compat!r}")
    if isinstance(peft_model, Accelerated):
        acceleration_of(peft_model).compat = compat
        return peft_model
    own = _peft_class(peft_model)
    check_adapters(peft_model, own)
    for name in PATCHED:
        if name in vars(peft_model) and not _is_left_behind(peft_model, name):
            raise TypeError(f"{own.__name__} cannot be accelerated: its `{name}` was replaced")
    runner = _runner(peft_model, cuda_graphs)
    _drop_own_methods(peft_model)
    vars(peft_model)[STATE] = Acceleration(compat, runner)
    peft_model.__class__ = _accelerated_class(own)
    return peft_model


def restore(peft_model: Any) -> Any:
    """Undoes :func:`accelerate`, in place, and returns the model: its class, its methods and its base's attention.

    Raises:
        TypeError: the model is not accelerated.
    """
    if not isinstance(peft_model, Accelerated):
        raise TypeError(f"`peft_model` must be an accelerated model, got {type(peft_model).__name__}")
    acceleration_of(peft_model).runner.unload()
    del vars(peft_model)[STATE]
    _drop_own_methods(peft_model)
    peft_model.__class__ = peft_model.peft_class
    return peft_model


class Accelerated:
    """What an accelerated model has beside its class in PEFT."""

    peft_class: type

    def execution_report(self) -> ExecutionReport:
        """The layout that is used, the reason, and the result of the check once it has run."""
        report: ExecutionReport = acceleration_of(self).runner.execution_report()
        return report

    @contextmanager
    def disable_adapter(self) -> Iterator[None]:
        """As PEFT's. PEFT then leaves bound methods on the instance, which would hide the class's."""
        try:
            with super().disable_adapter():  # type: ignore[misc]
                yield
        finally:
            _drop_own_methods(self)

    def __reduce_ex__(self, protocol: Any) -> tuple[Any, ...]:
        return _empty, (self.peft_class,), self.__dict__


def acceleration_of(model: Any) -> Acceleration:
    """The state of an accelerated model."""
    state: Acceleration = vars(model)[STATE]
    return state


@cache
def _accelerated_class(own: Any) -> Any:
    """The subclass of a PEFT class that accelerated models have; it has the same name and signatures."""

    @wraps(own.forward)
    @torch.compiler.disable
    def forward(self: Any, *args: Any, **keywords: Any) -> Any:
        return _forward(self, own, args, keywords)

    @wraps(own.generate)
    @torch.compiler.disable
    def generate(self: Any, *args: Any, **keywords: Any) -> Any:
        return _generate(self, own, args, keywords)

    members = {"peft_class": own, "forward": forward, "generate": generate, "__module__": own.__module__}
    return type(own.__name__, (Accelerated, own), members | {"__doc__": own.__doc__})


def _empty(own: Any) -> Any:
    accelerated = _accelerated_class(own)
    return accelerated.__new__(accelerated)


def _peft_class(model: Any) -> Any:
    """The class of a PEFT model.

    Raises:
        TypeError: it is none that can be accelerated.
    """
    for owner in type(model).__mro__:
        if owner.__module__ == "peft.peft_model" and owner.__name__ in TASKS:
            changed = next((n for n in ("forward", "generate") if getattr(type(model), n) is not getattr(owner, n)), "")
            if changed:
                raise TypeError(f"{type(model).__name__} cannot be accelerated: it has a `{changed}` of its own")
            return type(model)
    raise TypeError(f"`peft_model` must be one of PEFT's {', '.join(TASKS)}, got {type(model).__name__}")


def _runner(model: Any, cuda_graphs: bool) -> Any:
    """What runs the base model of a PEFT model. The base's trainable parameters stay trainable."""
    base = model.base_model
    trained = [parameter for parameter in base.parameters() if parameter.requires_grad]
    for parameter in trained:  # PEFT trains its own copy of a head; SoftPromptModel freezes what is not frozen already
        parameter.requires_grad_(False)
    try:
        if is_prefix(model):
            return DeepPromptModel(base, cuda_graphs=cuda_graphs)
        return SoftPromptModel(base, cuda_graphs=cuda_graphs, train_head=False)
    finally:
        for parameter in trained:
            parameter.requires_grad_(True)


def _names(model: Any) -> list[str]:
    return [owner.__name__ for owner in type(model).__mro__]


def _generates(model: Any) -> bool:
    return any(name in _names(model) for name in ("PeftModelForCausalLM", "PeftModelForSeq2SeqLM"))


def _is_left_behind(model: Any, name: str) -> bool:
    """Whether an attribute of the instance is a method of its class, as PEFT's ``disable_adapter`` leaves it."""
    own: Any = getattr(model, "peft_class", type(model))
    function = getattr(vars(model).get(name), "__func__", None)
    return function is not None and function in (getattr(own, name), getattr(_accelerated_class(own), name))


def _drop_own_methods(model: Any) -> None:
    for name in PATCHED:
        if _is_left_behind(model, name):
            del vars(model)[name]


def _own(model: Any, reason: str) -> None:
    """Logs once why PEFT runs a call."""
    reported = acceleration_of(model).reported
    if reason not in reported:
        reported.add(reason)
        logger.warning("PEFT runs %s itself: %s", type(model).__name__, reason)


def _bank(model: Any) -> FastSoftPrompt:
    prompt = active_prompt(model)
    return FastSoftPrompt.holding({"active": prompt}, prompt.shape[1])


# --- forward ---


def _forward(model: Any, own: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    if STATE not in vars(model):  # restored inside `disable_adapter`, which puts the method back
        return own.forward(model, *args, **keywords)
    bound = inspect.signature(own.forward).bind(model, *args, **keywords).arguments
    given = {**bound, **bound.get("kwargs", {})}
    for name in ("self", "kwargs", "task_ids"):
        given.pop(name, None)
    given = {name: value for name, value in given.items() if value is not None}
    reason = _reason_for_peft(model, given)
    if reason is not None:
        _own(model, reason)
        return own.forward(model, *args, **keywords)
    acceleration = acceleration_of(model)
    if acceleration.compat == "exact" and _differs(model, given):
        return own.forward(model, *args, **keywords)
    # As PEFT does it; it has no public function for this.
    ignored = {"position_ids": "Position ids"}
    if _generates(model):
        ignored["token_type_ids"] = "Token type ids"
    for name, words in ignored.items():
        if given.pop(name, None) is not None:
            text = f"{words} are not supported for parameter efficient tuning. Ignoring {words.lower()}."
            warnings.warn(text, stacklevel=3)
    given = {name: value for name, value in given.items() if value is not None}
    given.pop("use_cache", None)
    given["prompts"] = _bank(model)
    given["prompt_columns"] = 0 if is_prefix(model) else model.active_peft_config.num_virtual_tokens
    try:
        return _language_model_output(model, given)
    except TypeError:
        if acceleration.refusal is None:
            raise
        return _forward(model, own, args, keywords)  # PEFT runs it: the first batch has shown that prefixes cannot


def _language_model_output(model: Any, given: dict[str, Any]) -> Any:
    acceleration = acceleration_of(model)
    runner = acceleration.runner
    if not _may_be_lazy(model, given):
        return runner(**given, return_logits=True)
    as_mapping = given.pop("return_dict", getattr(model.config, "return_dict", True))
    output = runner(**given, return_logits=False, return_dict=True)

    def logits() -> Tensor:
        acceleration.reads_logits = True
        with torch.inference_mode(False), torch.enable_grad():  # as in the forward pass that they belong to
            values: Tensor = runner(**given, return_logits=True, return_dict=True).logits
        return values

    output = with_lazy_logits(output, logits)
    return output if as_mapping else output.to_tuple()


def _may_be_lazy(model: Any, given: dict[str, Any]) -> bool:
    """Whether a training batch's logits can be computed later, with the same result."""
    if "labels" not in given or not model.training or not torch.is_grad_enabled():
        return False
    if acceleration_of(model).reads_logits or "PeftModelForCausalLM" not in _names(model):
        return False
    base = model.base_model
    if torch.is_autocast_enabled(base.device.type):
        return False  # it may be over when the logits are read
    return not any(parameter.requires_grad for parameter in base.parameters()) and not draws_random_numbers(base)


def _reason_for_peft(model: Any, given: dict[str, Any]) -> str | None:
    """Why PEFT must run a call of forward; None: it need not."""
    if model.base_model is not acceleration_of(model).runner.base_model:
        return "its base model is a replica or was replaced"
    if given.get("use_cache"):
        return "`use_cache` asks for a cache in PEFT's layout"
    for name in LEFT_TO_PEFT:
        if name in given:
            return f"`{name}` was given"
    if acceleration_of(model).refusal is not None:
        return acceleration_of(model).refusal
    if is_prefix(model):
        allowed = PACKED_OPTIONS | {"input_ids", "inputs_embeds", "attention_mask", "labels", "return_dict"}
        other = [name for name in given.keys() - allowed - {"use_cache", "logits_to_keep"} if given[name] is not False]
        if other:
            return f"`{sorted(other)[0]}` cannot be combined with deep prompts"
    return None


def _differs(model: Any, given: dict[str, Any]) -> bool:
    """Whether PEFT's result of a call of forward is not what each row gets alone."""
    names = _names(model)
    if "labels" in given and "PeftModelForTokenClassification" in names:
        return True
    if "start_positions" in given or "end_positions" in given:
        return True
    pools_last = "PeftModelForSequenceClassification" in names and pools_last_token(model.base_model)
    return padding_differs(given.get("attention_mask"), on_the_right=pools_last)


# --- generate ---


def _generate(model: Any, own: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
    if model._adapters_disabled:
        return model.base_model.generate(*args, **keywords)
    if STATE not in vars(model) or not _generates(model):
        return own.generate(model, *args, **keywords)
    bound = inspect.signature(model.base_model.generate).bind_partial(*args, **keywords).arguments
    given = {**bound, **bound.get("kwargs", {})}
    for name in ("kwargs", "task_ids"):
        given.pop(name, None)
    ids = given.pop("input_ids", None)
    inputs = given.pop("inputs", None)
    ids = inputs if ids is None else ids
    mask = given.pop("attention_mask", None)
    if vars(model).get("generation_config") is not None:
        given.setdefault("generation_config", model.generation_config)
    if mask is None and isinstance(ids, Tensor):
        mask = inferred_mask(model.base_model, ids, given)
    reason = _reason_for_peft_to_generate(model, ids, given)
    if reason is not None:
        _own(model, reason)
        return own.generate(model, *args, **keywords)
    if acceleration_of(model).compat == "exact" and padding_differs(mask, on_the_right=True):
        return own.generate(model, *args, **keywords)
    given.pop("position_ids", None)
    try:
        with torch.no_grad():
            return acceleration_of(model).runner.generate(ids, mask, prompts=_bank(model), **given)
    except TypeError:
        if acceleration_of(model).refusal is None:
            raise
        return _generate(model, own, args, keywords)


def _reason_for_peft_to_generate(model: Any, input_ids: Any, given: dict[str, Any]) -> str | None:
    """Why PEFT must run a call of generate; None: it need not."""
    if not isinstance(input_ids, Tensor):
        return "`generate` got no input_ids"
    reason = _reason_for_peft(model, {k: v for k, v in given.items() if k in LEFT_TO_PEFT})
    if reason is not None:
        return reason
    further = {}
    if getattr(model.config, "is_encoder_decoder", False):
        further = generation_options.REFUSED_WITH_ENCODER
    elif acceleration_of(model).runner.execution_report().execution == "padded":
        further = generation_options.REFUSED_WITH_VECTORS
    try:
        generation_options.checked_options(
            model.base_model, {k: v for k, v in given.items() if k != "position_ids"}, further
        )
    except ValueError as error:
        return str(error)
    return None
