"""The methods, their settings and defaults, and a job: one method with one seed."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any

from ..base.version import __version__
from ..tasks.task import Task
from ..tuning.settings import TuningSettings
from ..tuning.settings import instruction as label_instruction

RESULT_FORMAT = 1
"""Format of result files. It is part of their key, so files of another format are not reused."""

METHODS = ("zero-shot", "instruction", "few-shot", "prompt", "peft-prompt", "lora", "linear-probe", "full")
TRAINED = ("prompt", "peft-prompt", "lora", "full")
"""Methods trained by gradient steps, with the same steps, batch size and schedule."""
WITHOUT_SEED = ("zero-shot", "instruction", "linear-probe")
"""Methods without any random choice. They run once, whatever the number of seeds."""
UNTRAINED = ("zero-shot", "instruction", "few-shot")

STEPS = 120
BATCH_SIZE = 32
VIRTUAL_TOKENS = 20
DESCRIPTIONS = {
    "zero-shot": "the template alone",
    "instruction": "an instruction in front of the template",
    "few-shot": "the instruction and labelled training rows in front, balanced over the labels",
    "prompt": "a soft prompt, tuned by softprompt_fast",
    "peft-prompt": "a soft prompt, tuned with PEFT's PromptTuning as its users run it",
    "lora": "PEFT's LoRA: low-rank updates of the linear layers",
    "linear-probe": "a logistic regression on the frozen model's last hidden state at the last token",
    "full": "all weights, fine-tuned",
}

# The loop of every trained method but `prompt`, whose own defaults in `tune` are the same.
LOOP: dict[str, Any] = {"steps": STEPS, "evaluations": 5, "warmup": 0.05, "weight_decay": 0.0, "max_grad_norm": 1.0}
DEFAULTS: dict[str, dict[str, Any]] = {
    "zero-shot": {},
    "instruction": {"instruction": None},
    "few-shot": {"instruction": None, "shots": 8, "separator": "\n\n"},
    "prompt": {"num_virtual_tokens": VIRTUAL_TOKENS, "steps": STEPS},
    # 3e-2: PEFT's guide to prompt-based methods; RANDOM: PromptTuningConfig's default.
    "peft-prompt": {
        "num_virtual_tokens": VIRTUAL_TOKENS,
        "init": "RANDOM",
        "init_text": None,
        "learning_rate": 3e-2,
        **LOOP,
    },
    "lora": {
        "r": 8,
        "alpha": 16,
        "dropout": 0.0,
        "target_modules": "all-linear",
        "learning_rate": 3e-4,
        **LOOP,
    },
    "linear-probe": {"C": [0.0001, 0.001, 0.01, 0.1, 1.0, 10.0], "max_iter": 2000},
    "full": {"learning_rate": 3e-5, **LOOP},
}
PEFT_INITS = ("RANDOM", "SAMPLE_VOCAB", "TEXT")
RATE_SOURCES = {
    "prompt": "softprompt_fast's own default",
    "peft-prompt": "3e-2 is that of PEFT's guide to prompt-based methods (transformers' Trainer: 5e-5)",
    "lora": "3e-4, common for LoRA of small models",
    "full": "3e-5, common for full fine-tuning of pretrained language models",
}


@dataclass
class Job:
    """One method with one seed, with everything that its process needs to know."""

    method: str
    seed: int
    model: str
    dtype: str
    device: str | None
    threads: int | None
    task: dict[str, Any]
    options: dict[str, Any]
    batch_size: int
    data: str
    """Folder with train.jsonl, validation.jsonl and test.jsonl."""
    data_digest: str
    model_digest: str
    result: str
    """File of the result."""
    artifacts: str
    """Folder for the method's prompt or adapter."""

    @property
    def name(self) -> str:
        return f"{self.method}-seed{self.seed}"

    def key(self) -> str:
        """Identifies settings and data, wherever the files are and however many threads run."""
        facts = asdict(self)
        for other in ("data", "result", "artifacts", "threads"):
            del facts[other]
        if self.method == "prompt":  # the defaults of other settings may change
            facts["options"] = TuningSettings().with_changes(self.options).to_json()
        text = json.dumps(
            {"format": RESULT_FORMAT, "version": __version__, **facts}, sort_keys=True, ensure_ascii=False
        )
        return hashlib.sha256(text.encode()).hexdigest()


def check_methods(methods: Sequence[str]) -> list[str]:
    """The methods in the order of :data:`METHODS`, each once."""
    unknown = [method for method in methods if method not in METHODS]
    if unknown or not methods:
        raise ValueError(f"`methods` must be some of {', '.join(METHODS)}, got {', '.join(unknown) or 'none'}")
    return [method for method in METHODS if method in methods]


def parse_options(values: Sequence[str]) -> dict[str, dict[str, Any]]:
    """``["lora.r=4", "prompt.init=text"]`` as ``{"lora": {"r": 4}, "prompt": {"init": "text"}}``; values are JSON,
    or else text."""
    options: dict[str, dict[str, Any]] = {}
    for value in values:
        name, equals, setting = value.partition("=")
        method, dot, option = name.partition(".")
        if not equals or not dot or not option:
            raise ValueError(f"--set must be METHOD.OPTION=VALUE, got {value!r}")
        try:
            options.setdefault(method, {})[option] = json.loads(setting)
        except json.JSONDecodeError:
            options.setdefault(method, {})[option] = setting
    return options


def resolve_options(
    method: str,
    given: Mapping[str, Any],
    *,
    task: Task,
    steps: int,
    virtual_tokens: int,
    instruction: str | None,
) -> dict[str, Any]:
    """A method's settings: its defaults, then those that all methods share, then ``given`` for this method alone."""
    options = dict(DEFAULTS[method])
    if "steps" in options:
        options["steps"] = steps
    if "num_virtual_tokens" in options:
        options["num_virtual_tokens"] = virtual_tokens
    if "instruction" in options:
        options["instruction"] = default_instruction(task) if instruction is None else instruction
    allowed = _tune_keywords() if method == "prompt" else list(options)
    for name, value in given.items():
        if name not in allowed:
            raise ValueError(f"`options` of {method!r} must be some of {', '.join(allowed) or 'none'}, got {name!r}")
        options[name] = value
    if method == "peft-prompt" and options["init"] not in PEFT_INITS:
        raise ValueError(f"`init` of 'peft-prompt' must be one of {', '.join(PEFT_INITS)}, got {options['init']!r}")
    if method == "prompt":
        TuningSettings().with_changes(options)  # raises now, not in the middle of the comparison
    return options


def default_instruction(task: Task) -> str:
    """An instruction made of the label words."""
    if task.kind == "generation":
        return "Answer the following.\n"
    return label_instruction(task.label_words)


def model_digest(name: str) -> str:
    """Changes when a folder's weights or configuration change. The digest of a name on the Hub is the name itself."""
    folder = Path(name)
    if not folder.is_dir():
        return name
    files = sorted(file for file in folder.iterdir() if file.suffix in (".json", ".safetensors", ".bin", ".gguf"))
    facts = [(file.name, file.stat().st_size, file.stat().st_mtime_ns) for file in files]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _tune_keywords() -> list[str]:
    """Settings of ``tune`` that may differ for this method; the comparison sets the others for all methods."""
    return [f.name for f in fields(TuningSettings) if f.name not in ("batch_size", "seed")]
