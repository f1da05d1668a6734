"""One training step of a PEFT prompt-tuning script, and of the same script with ``softprompt_fast.accelerate``.

A language model and a classifier of rows with the same decoder.

Both train the same prompt on the same rows, padded on the right, interleaved in one process. Reported are medians, for
steps that only read the loss and for steps that also read the logits. Usage::

    python benchmarks/bench_peft_inplace.py [--rounds 5] [--output benchmarks/results/peft_inplace_cpu.csv]
"""

from __future__ import annotations

import copy
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import peft
import torch
import transformers
from common import Row, add_model_arguments, append_rows, argument_parser, environment, interleaved, load
from torch import Tensor

import softprompt_fast as spf

VIRTUAL, ROWS, TOKENS = 20, 16, 32
SHORTEST = (16, 32)
"""Tokens of the shortest row; the longest has TOKENS."""
LABELS = ("text", "answer", "class")
"""Every token of a row is a target, or only its last one; or each row has a class."""
CLASSES = 3
WARM_UP = 4
"""Further steps before the measurement on a GPU: then a batch runs as a CUDA graph."""


def batch(shortest: int, labels: str, vocabulary: int) -> dict[str, Tensor]:
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(3, vocabulary, (ROWS, TOKENS), generator=generator)
    lengths = torch.linspace(shortest, TOKENS, ROWS).round().long()[torch.randperm(ROWS, generator=generator)]
    columns = torch.arange(TOKENS)[None]
    real = columns < lengths[:, None]
    if labels == "class":
        return {"input_ids": ids, "attention_mask": real.long(), "labels": torch.arange(ROWS) % CLASSES}
    targets = real if labels == "text" else columns == lengths[:, None] - 1
    return {"input_ids": ids, "attention_mask": real.long(), "labels": ids.masked_fill(~targets, -100)}


def step(model: Any, inputs: dict[str, Tensor], *, accelerated: bool, read: bool) -> Callable[[], float]:
    """A function that runs one step of a training loop and returns the loss."""
    torch.manual_seed(0)
    task = "SEQ_CLS" if "labels" in inputs and inputs["labels"].dim() == 1 else "CAUSAL_LM"
    config = peft.PromptTuningConfig(task_type=task, num_virtual_tokens=VIRTUAL)
    tuned: Any = peft.get_peft_model(model, config).train().to(model.device)
    if accelerated:
        spf.accelerate(tuned)
    optimizer = torch.optim.AdamW([p for p in tuned.parameters() if p.requires_grad], lr=1e-3)

    def run() -> float:
        output = tuned(**inputs)
        if read:
            output.logits.argmax(-1)
        output.loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        loss: float = output.loss.item()
        return loss

    return run


def classifier(model: Any) -> Any:
    """A classifier of rows with a new head on the decoder of a language model."""
    torch.manual_seed(0)
    config = copy.deepcopy(model.config)
    config.num_labels, config.pad_token_id = CLASSES, 0
    with torch.device(model.device):
        head = transformers.AutoModelForSequenceClassification.from_config(config).to(model.dtype)
    head.base_model.load_state_dict(model.base_model.state_dict())
    return head


def main() -> None:
    parser = argument_parser(__doc__)
    add_model_arguments(parser, dtype="float32", rounds=5)
    arguments = parser.parse_args()
    device = arguments.device
    models = [load(arguments.model, arguments.dtype, device) for _ in range(2)]
    rows: list[Row] = []
    for shortest in SHORTEST:
        for labels in LABELS:
            inputs = {
                name: value.to(device) for name, value in batch(shortest, labels, models[0].config.vocab_size).items()
            }
            # A head is trained, so each run of a classifier has a model of its own.
            plain, base, other = (classifier(models[0]) if labels == "class" else models[n] for n in (0, 1, 1))
            runs = {
                "peft": step(plain, inputs, accelerated=False, read=False),
                "accelerated": step(base, inputs, accelerated=True, read=False),
                "accelerated_logits": step(other, inputs, accelerated=True, read=True),
            }
            losses = {name: run() for name, run in runs.items()}
            for run in runs.values() if device != "cpu" else ():
                for _ in range(WARM_UP):
                    run()
            # PEFT's classifier reads padding where rows have different lengths.
            comparable = labels != "class" or shortest == TOKENS
            error = max(abs(loss / losses["peft"] - 1) for loss in losses.values())
            medians = interleaved(runs, arguments.rounds, device=device)
            row: Row = {
                **environment(device),
                "model": Path(arguments.model).name,
                "dtype": arguments.dtype,
                "rows": f"{ROWS} of {shortest} to {TOKENS}",
                "labels": labels,
                **{f"{name}_s": round(value, 3) for name, value in medians.items()},
                "faster": round(medians["peft"] / medians["accelerated"], 2),
                "faster_reading_logits": round(medians["peft"] / medians["accelerated_logits"], 2),
                "loss_error": f"{error:.1e}" if comparable else "",
            }
            print(json.dumps(row), flush=True)
            rows.append(row)
    if arguments.output:
        append_rows(arguments.output, rows)


if __name__ == "__main__":
    main()
