"""Whether a model's head is trained together with its prompts."""

from __future__ import annotations

import logging
from typing import Any

from ..hf.heads import head_modules, head_parameters, heads_of_peft, is_fresh

logger = logging.getLogger("softprompt_fast")


def trained_head(model: Any, train_head: bool | None, *, train_adapters: bool = False) -> tuple[tuple[str, ...], bool]:
    """The names of a model's head modules, and whether they are trained.

    Args:
        train_head: None: if the head's weights are random because no checkpoint held them. Where that cannot be known,
            the head is not trained and one log line says so.
        train_adapters: whether PEFT's adapters are trained. A head that PEFT trains by itself is one of them; if it is
            frozen, one log line says so.

    Raises:
        TypeError: `train_head` is not a bool or None.
        ValueError: it is True, and the model has no head to train.
    """
    name = type(model).__name__
    if train_head not in (None, True, False):
        raise TypeError(f"`train_head` must be True, False or None, got {train_head!r}")
    names = head_modules(model)
    if not names and train_head is None and not train_adapters and (kept := ", ".join(heads_of_peft(model))):
        logger.warning(
            "the head of %s (%s) is frozen, because it is part of PEFT's adapter: train_adapters=True trains both with "
            "the prompts, train_head=False confirms that it was trained",
            name,
            kept,
        )
    if not names or train_head is not None:
        if train_head and not names:
            kept = ", ".join(heads_of_peft(model))
            reason = f"PEFT trains the head of {name} ({kept}) by itself: give train_adapters=True"
            none = f"{name} has no head besides one for language modelling"
            raise ValueError(f"`train_head` cannot be True: {reason if kept else none}")
        if train_head and not all(p.is_floating_point() for p in head_parameters(model, names)):
            raise ValueError(f"`train_head` cannot be True: the head of {name} is quantised")
        return names, bool(train_head)
    fresh = is_fresh(model, names)
    if fresh:
        logger.info("the head of %s (%s) has new weights and is trained with the prompts", name, ", ".join(names))
    elif fresh is None:
        logger.warning(
            "the head of %s (%s) is frozen, and whether it was ever trained is not known: train_head=True trains it "
            "with the prompts, train_head=False confirms that it was",
            name,
            ", ".join(names),
        )
    return names, bool(fresh)
