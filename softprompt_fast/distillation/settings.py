"""Settings of a compression: one dataclass for Python, for the command line and for the report."""

from __future__ import annotations

from dataclasses import dataclass, field
from os import PathLike

from ..base.fields import (
    NOT_NEGATIVE_INTEGER,
    POSITIVE,
    POSITIVE_INTEGER,
    SEED,
    YES_OR_NO,
    check_fields,
    described,
    one_of,
)
from ..base.precision import PRECISIONS

PROMPT, TEACHER, TRAINING, OUTPUT = "Prompt", "Teacher", "Training", "Output"
FORMS = ("embeddings", "kv")
FITTED = "fitted"
INITS = ("text", "sampled", "pooled", FITTED)
"""Initial values that are made from the text; see ``initial_values.py`` and, for ``fitted``, ``fitting.py``."""
LEARNING_RATES = {"embeddings": 1e-2, "kv": 5e-3, FITTED: 1e-3}
"""Default learning rates of each form, and of fitted keys and values, which are nearly right; for SmolLM2-135M."""


@dataclass(frozen=True)
class DistillationSettings:
    """Settings of :func:`compress`."""

    form: str = field(
        default="embeddings",
        metadata=described(
            "Train N vectors at the input (embeddings), or the keys and values of N positions in every layer (kv).",
            one_of(*FORMS),
            group=PROMPT,
        ),
    )
    init: str | PathLike[str] = field(
        default="auto",
        metadata=described(
            "Initial values: text (the text's first tokens), sampled (tokens spread evenly over the text), pooled (the "
            "means of N parts of the text), fitted (for kv: keys of the text, with values fitted to its attention), or "
            "the folder or file of a prompt. auto measures those made from the text and takes the best.",
            group=PROMPT,
        ),
    )
    keep_first: bool = field(
        default=False,
        metadata=described(
            "Do not train the first position. Many models attend to it from everywhere (attention sink).",
            YES_OR_NO,
            group=PROMPT,
            flags=("--keep-first",),
        ),
    )
    new_tokens: int = field(
        default=16,
        metadata=described(
            "Longest continuation, in tokens, that the teacher gives to a query.", POSITIVE_INTEGER, group=TEACHER
        ),
    )
    continuation: str = field(
        default="greedy",
        metadata=described(
            "How the teacher continues a query: with its most probable tokens, or with drawn ones.",
            one_of("greedy", "sampled"),
            group=TEACHER,
        ),
    )
    top_k: int = field(
        default=20,
        metadata=described(
            "Number of the teacher's most probable tokens that are learnt at each place. The other tokens together "
            "are one more class.",
            POSITIVE_INTEGER,
            group=TEACHER,
        ),
    )
    divergence: str = field(
        default="forward",
        metadata=described(
            "Divergence that training minimises: forward (from the teacher, on its continuations), reverse (from the "
            "student, on continuations drawn from the student in every step), or the mean of both (mixed).",
            one_of("forward", "reverse", "mixed"),
            group=TRAINING,
        ),
    )
    temperature: float = field(
        default=1.0,
        metadata=described("Divides the logits of teacher and student in the loss.", POSITIVE, group=TEACHER),
    )
    max_length: int = field(
        default=512,
        metadata=described(
            "Longest query in tokens. Longer ones lose their beginning.", POSITIVE_INTEGER, group=TEACHER
        ),
    )
    steps: int = field(
        default=100, metadata=described("Optimiser steps for each number of tokens.", POSITIVE_INTEGER, group=TRAINING)
    )
    batch_size: int = field(
        default=16,
        metadata=described("Queries in a batch.", POSITIVE_INTEGER, group=TRAINING, flags=("--batch-size", "-b")),
    )
    learning_rate: float | None = field(
        default=None,
        metadata=described(
            "Learning rate of AdamW after the warm-up. By default 1e-2 for embeddings, 5e-3 for kv, and "
            "1e-3 for kv whose initial values are fitted.",
            POSITIVE,
            group=TRAINING,
            flags=("--learning-rate", "--lr"),
        ),
    )
    max_grad_norm: float = field(
        default=1.0,
        metadata=described("Gradients with a larger norm are scaled down to this norm.", POSITIVE, group=TRAINING),
    )
    matmul_precision: str | None = field(
        default=None,
        metadata=described(
            "Precision of float32 products while the prompt is trained: highest, high or medium, as in "
            "torch.set_float32_matmul_precision. medium is bfloat16 on CPUs that have it, and TF32 on GPUs. By default "
            "that which PyTorch is set to.",
            one_of(*PRECISIONS),
            group=TRAINING,
        ),
    )
    seed: int = field(
        default=0,
        metadata=described(
            "Seed of the held-out queries, of the order of queries, and of what is drawn.", SEED, group=TRAINING
        ),
    )
    free_continuations: int = field(
        default=32,
        metadata=described(
            "Most held-out queries after which the report compares what each prompt says freely with what the teacher "
            "says; 0: none.",
            NOT_NEGATIVE_INTEGER,
            group=OUTPUT,
        ),
    )

    def __post_init__(self) -> None:
        check_fields(self)
        if self.keep_first and self.init == "pooled":
            raise ValueError("`keep_first` cannot be combined with `init` pooled, whose first position is a mean")
        if self.form != "kv" and self.init == FITTED:
            raise ValueError(f"`init` fitted needs `form` kv, got {self.form}")

    def rate_from(self, init: str) -> float:
        """The learning rate after the warm-up, from a kind of initial values."""
        if self.learning_rate is not None:
            return self.learning_rate
        return LEARNING_RATES[FITTED if init == FITTED else self.form]
