"""Settings of tuning: one dataclass for Python, for the command line and for the file saved with a result."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from ..base.fields import (
    NOT_NEGATIVE,
    NOT_NEGATIVE_INTEGER,
    POSITIVE,
    POSITIVE_INTEGER,
    SEED,
    SHARE,
    check_fields,
    described,
    one_of,
)

if TYPE_CHECKING:  # the command line reads the settings without waiting for torch
    from torch import Tensor

DEFAULT_TOKENS = 20
DEFAULT_STEPS = 120
PROMPT, TRAINING, REGULARISATION = "Prompt", "Training", "Regularisation"


@dataclass(frozen=True)
class TuningSettings:
    """Settings of :func:`tune`; ``docs/recipes.md`` says where the defaults come from.

    ``init`` also takes what :meth:`FastSoftPrompt.add_prompt` takes, such as a tensor [P, D].
    """

    num_virtual_tokens: int | None = field(
        default=None,
        metadata=described(
            "Length of the prompt in virtual tokens. By default 20, or the number of vectors that `init` has.",
            POSITIVE_INTEGER,
            group=PROMPT,
            flags=("--virtual-tokens", "-P"),
        ),
    )
    init: str | Tensor | PathLike[str] = field(
        default="auto",
        metadata=described(
            "Initial values: auto, random, vocabulary, text, class_labels, or the folder or file of a prompt. For "
            "classification, auto is an instruction that names the labels; for generation, it is vocabulary.",
            group=PROMPT,
        ),
    )
    init_text: str | None = field(
        default=None,
        metadata=described("Text whose token embeddings are the initial values, with `init` text.", group=PROMPT),
    )
    num_frozen_tokens: int = field(
        default=0,
        metadata=described(
            "First positions of a deep prompt that keep their initial values; 1 keeps an attention sink as it was.",
            NOT_NEGATIVE_INTEGER,
            group=PROMPT,
        ),
    )
    init_noise: float = field(
        default=0.0,
        metadata=described(
            "Standard deviation of noise added to the initial values, relative to theirs.",
            NOT_NEGATIVE,
            group=PROMPT,
        ),
    )
    objective: str = field(
        default="labels",
        metadata=described(
            "Cross entropy among the labels (labels; encoder-decoders only with words of several tokens), or among all "
            "tokens (vocabulary).",
            one_of("labels", "vocabulary"),
            group=TRAINING,
        ),
    )
    label_smoothing: float = field(
        default=0.0,
        metadata=described("Share of the target that is spread over the other answers.", SHARE, group=REGULARISATION),
    )
    optimizer: str = field(
        default="adamw",
        metadata=described(
            "Optimiser. Lester et al. 2021 use adafactor with `schedule` constant and `learning_rate` 0.3.",
            one_of("adamw", "adafactor"),
            group=TRAINING,
        ),
    )
    learning_rate: float = field(
        default=3e-2,
        metadata=described(
            "Learning rate after the warm-up.", POSITIVE, group=TRAINING, flags=("--learning-rate", "--lr")
        ),
    )
    schedule: str = field(
        default="cosine",
        metadata=described(
            "Learning rate after a warm-up over a twentieth of the steps: cosine and linear fall to 0.",
            one_of("cosine", "linear", "constant"),
            group=TRAINING,
        ),
    )
    batch_size: int = field(
        default=32,
        metadata=described(
            "Rows per batch, for each prompt that is tuned.",
            POSITIVE_INTEGER,
            group=TRAINING,
            flags=("--batch-size", "-b"),
        ),
    )
    gradient_accumulation_steps: int = field(
        default=1,
        metadata=described("Batches per optimiser step.", POSITIVE_INTEGER, group=TRAINING, flags=("--accumulate",)),
    )
    steps: int | None = field(
        default=None,
        metadata=described(
            "Optimiser steps. By default 120, unless `epochs` is given.", POSITIVE_INTEGER, group=TRAINING
        ),
    )
    epochs: float | None = field(
        default=None, metadata=described("Passes over the training rows, instead of `steps`.", POSITIVE, group=TRAINING)
    )
    eval_every: int | None = field(
        default=None,
        metadata=described(
            "Steps between evaluations on the held-out rows. By default there are five evaluations.",
            POSITIVE_INTEGER,
            group=TRAINING,
        ),
    )
    best_by: str = field(
        default="loss",
        metadata=described(
            "Keep the checkpoint with the lowest loss or the highest accuracy on the held-out rows. For "
            "classification, the loss is that among the labels. Accuracy is coarse: its standard error on 200 rows is "
            "2 to 3 points. For BIO tags it is the F1 of spans, for question answering the share of exact matches.",
            one_of("loss", "accuracy"),
            group=TRAINING,
        ),
    )
    patience: int | None = field(
        default=None,
        metadata=described(
            "Stop early after this number of evaluations in a row without a better score. By default never.",
            POSITIVE_INTEGER,
            group=TRAINING,
        ),
    )
    max_grad_norm: float = field(
        default=1.0,
        metadata=described("Gradients with a larger norm are scaled down to this norm.", POSITIVE, group=TRAINING),
    )
    decay_to_initial: float = field(
        default=0.0,
        metadata=described("Weight decay of the distance from the initial prompt.", NOT_NEGATIVE, group=REGULARISATION),
    )
    prompt_dropout: float = field(
        default=0.0,
        metadata=described(
            "Probability that a number of the prompt is dropped in a training step.",
            SHARE,
            group=REGULARISATION,
        ),
    )
    norm_bound: float | None = field(
        default=None,
        metadata=described(
            "Longest vector, in mean norms of the model's token embeddings. By default there is no bound.",
            POSITIVE,
            group=REGULARISATION,
        ),
    )
    reparameterization: str = field(
        default="none",
        metadata=described(
            "Form in which the prompt is trained: residual passes it through an MLP with a skip connection, low-rank "
            "trains an update of rank `rank`. The saved prompt has plain vectors.",
            one_of("none", "residual", "low-rank"),
            group=PROMPT,
        ),
    )
    rank: int = field(default=8, metadata=described("Rank of the low-rank form.", POSITIVE_INTEGER, group=PROMPT))
    bottleneck: int = field(
        default=128, metadata=described("Width of the residual form's MLP.", POSITIVE_INTEGER, group=PROMPT)
    )
    token_update_rank: int | None = field(
        default=None,
        metadata=described(
            "Rank of a low-rank update of the text's token embeddings, by position (DePT). By default there is none.",
            POSITIVE_INTEGER,
            group=PROMPT,
        ),
    )
    token_update_learning_rate: float = field(
        default=1e-3, metadata=described("Learning rate of the token update.", POSITIVE, group=PROMPT)
    )
    head_learning_rate: float = field(
        default=1e-3,
        metadata=described("Learning rate of a head that is trained with the prompt.", POSITIVE, group=TRAINING),
    )
    placement: str = field(
        default="before_bos",
        metadata=described(
            "Where the prompt is placed. With after_bos, the prompt is saved with the vector of BOS as its first one.",
            one_of("before_bos", "after_bos"),
            group=PROMPT,
        ),
    )
    seed: int = field(
        default=0,
        metadata=described(
            "Seed of the initial values and of the order of rows. The same seed gives the same prompt.",
            SEED,
            group=TRAINING,
        ),
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.steps is not None and self.epochs is not None:
            raise ValueError("`steps` cannot be combined with `epochs`; give one of them")
        if self.reparameterization == "low-rank" and self.decay_to_initial:
            raise ValueError("`decay_to_initial` cannot be combined with `reparameterization` low-rank")
        text = isinstance(self.init, str) and self.init == "text"
        if self.init_text is not None and not text:
            raise ValueError("`init_text` cannot be combined with an `init` other than text")
        if text and not self.init_text:
            raise ValueError(f"`init_text` must hold text with `init` text, got {self.init_text!r}")

    def with_changes(self, changes: Mapping[str, Any]) -> TuningSettings:
        """The same with some fields replaced.

        Raises:
            TypeError: not a setting.
        """
        known = [one.name for one in fields(self)]
        for name in changes:
            if name not in known:
                raise TypeError(f"`{name}` is not a setting of tuning, which has {', '.join(known)}")
        return replace(self, **changes)

    def to_json(self) -> dict[str, Any]:
        """The settings by name; a tensor is described by its shape."""
        init = self.init
        shown = fspath(init) if isinstance(init, (str, PathLike)) else f"tensor {list(init.shape)}"
        return {one.name: getattr(self, one.name) for one in fields(self)} | {"init": shown}


def instruction(label_words: Mapping[str, str]) -> str:
    """A sentence that asks for one of the labels, such as "Decide whether the following text is good or bad."."""
    words = [word.strip() for word in label_words.values()]
    return f"Decide whether the following text is {', '.join(words[:-1])} or {words[-1]}.\n"
