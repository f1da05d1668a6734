"""Soft prompts for frozen language models: joined in one fused pass, tuned and served without waste."""

from typing import TYPE_CHECKING

from .base.lazy import lazy_names
from .base.version import __version__

if TYPE_CHECKING:
    from .interop.acceleration import accelerate, restore
    from .models.deep_prompt_model import DeepPromptModel
    from .models.pooling import pooled_text
    from .models.soft_prompt_model import SoftPromptModel
    from .ops.assemble.batch import PackedRows, PromptedBatch
    from .ops.assemble.functional import assemble
    from .prompts.fast_soft_prompt import FastSoftPrompt
    from .prompts.initialization import initial_prompt
else:
    __getattr__ = lazy_names(
        __name__,
        {
            "DeepPromptModel": ".models.deep_prompt_model",
            "FastSoftPrompt": ".prompts.fast_soft_prompt",
            "PackedRows": ".ops.assemble.batch",
            "PromptedBatch": ".ops.assemble.batch",
            "SoftPromptModel": ".models.soft_prompt_model",
            "accelerate": ".interop.acceleration",
            "assemble": ".ops.assemble.functional",
            "initial_prompt": ".prompts.initialization",
            "pooled_text": ".models.pooling",
            "restore": ".interop.acceleration",
        },
    )

__all__ = [
    "DeepPromptModel",
    "FastSoftPrompt",
    "PackedRows",
    "PromptedBatch",
    "SoftPromptModel",
    "__version__",
    "accelerate",
    "assemble",
    "initial_prompt",
    "pooled_text",
    "restore",
]
