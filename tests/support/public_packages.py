"""The packages whose ``__all__`` is the public API."""

PUBLIC_PACKAGES = [
    "softprompt_fast",
    "softprompt_fast.prompts",
    "softprompt_fast.tasks",
    "softprompt_fast.hf",
    "softprompt_fast.tuning",
    "softprompt_fast.evaluation",
    "softprompt_fast.inference",
    "softprompt_fast.analysis",
    "softprompt_fast.comparison",
    "softprompt_fast.distillation",
    "softprompt_fast.length_search",
    "softprompt_fast.monitoring",
    "softprompt_fast.registry",
    "softprompt_fast.interop",
]

OPTIONAL_MODULES = {
    "softprompt_fast.interop.trl": "trl",
    "softprompt_fast.interop.sentence_transformers": "sentence_transformers",
}
"""Public modules that need another package."""
