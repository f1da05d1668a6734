"""Compares task heads of every model type of transformers with each row run alone.

    PYTHONPATH=tests python -m sweep.heads [model types ..]

Ends with status 1 if an outcome is neither exact nor refused.
"""

from __future__ import annotations

import argparse
import copy
import gc
import logging
import sys
import time
import warnings
from collections import Counter
from typing import Any

import torch
import transformers as tf
from torch import Tensor
from transformers.models.auto import modeling_auto

import softprompt_fast as spf

from . import model_types
from .outcomes import PROMPTS, ROWS, TEXTS, equal, outcome_of

HEADS = {
    "SequenceClassification": modeling_auto.MODEL_FOR_SEQUENCE_CLASSIFICATION_MAPPING_NAMES,
    "TokenClassification": modeling_auto.MODEL_FOR_TOKEN_CLASSIFICATION_MAPPING_NAMES,
    "QuestionAnswering": modeling_auto.MODEL_FOR_QUESTION_ANSWERING_MAPPING_NAMES,
}


def every_head() -> list[str]:
    """Names such as "TokenClassification:bert", one for each type and head that transformers has."""
    return [f"{head}:{name}" for head, names in HEADS.items() for name in names]


class HeadUnderTest:
    """A model with a task head, its prompts and a batch; and the plain model, which the library never sees."""

    def __init__(self, model: Any) -> None:
        self.model = model
        self.plain = copy.deepcopy(model).requires_grad_(False)
        generator = torch.Generator().manual_seed(2)
        weight = model.get_input_embeddings().weight
        self.prompts = {n: torch.randn(p, weight.shape[1], generator=generator) * 0.5 for n, p in PROMPTS.items()}
        width = max(TEXTS)
        self.ids = torch.randint(20, min(150, len(weight)), (len(TEXTS), width), generator=generator)
        self.mask = torch.zeros_like(self.ids)
        for row, length in enumerate(TEXTS):  # padding on the left and on the right
            start = (width - length) if row % 2 else 0
            self.mask[row, start : start + length] = 1
        self.scale = self._lookup_scale()

    def _lookup_scale(self) -> float:
        """The factor that the plain model applies to the vectors of ids only."""
        text = self.ids[:1]
        vectors = self.plain.get_input_embeddings()(text)
        with torch.no_grad():
            expected = numbers(self.plain(input_ids=text))
            for scale in (1.0, vectors.shape[-1] ** 0.5):
                got = numbers(self.plain(inputs_embeds=vectors * scale))
                if (got - expected).abs().max() < 1e-3 * expected.abs().max():
                    return scale
        return float("nan")

    def alone(self, row: int, used: dict[str, Tensor]) -> Tensor:
        """A row's numbers without padding: [C], or [T, C] of its tokens."""
        text = self.ids[row][self.mask[row].bool()]
        vectors = self.plain.get_input_embeddings()(text[None]) * self.scale
        name = ROWS[row]
        if name is not None:
            vectors = torch.cat([used[name][None].to(vectors), vectors], 1)
        got = numbers(self.plain(inputs_embeds=vectors))[0]
        return got[len(got) - len(text) :] if got.dim() > 1 else got


def numbers(output: Any) -> Tensor:
    """[B, C] of rows, [B, T, C] of tokens."""
    if output.get("start_logits") is not None:
        return torch.stack([output.start_logits, output.end_logits], -1)
    logits: Tensor = output.logits
    return logits


def compare(case: Any) -> str:
    """The layout that runs. The numbers and the prompts' gradients are those of each row alone."""
    tuned = spf.SoftPromptModel(case.model, train_head=False)
    for name, values in case.prompts.items():
        tuned.add_prompt(name, init=values)
    with torch.no_grad():
        got = numbers(tuned(case.ids, case.mask, prompt_ids=ROWS))
        for row in range(len(ROWS)):
            equal(of_row(case, got, row), case.alone(row, case.prompts), f"row {row}")
    used = {name: values.clone().requires_grad_() for name, values in case.prompts.items()}
    try:
        weighted([case.alone(row, used) for row in range(len(ROWS))]).backward()
    except Exception as error:
        return f"{tuned.execution_report().execution}; the plain model has no gradient: {type(error).__name__}"
    got = numbers(tuned(case.ids, case.mask, prompt_ids=ROWS))
    weighted([of_row(case, got, row) for row in range(len(ROWS))]).backward()
    for name, values in used.items():
        assert values.grad is not None
        if not values.grad.isfinite().all():
            return f"{tuned.execution_report().execution}; the plain model has no finite gradient"
        equal(tuned.prompts[name].grad, values.grad, f"gradient of {name}")
    return tuned.execution_report().execution


def of_row(case: Any, values: Tensor, row: int) -> Tensor:
    """A row's numbers [C], or [T, C] of its tokens, out of those of a batch."""
    return values[row][case.mask[row].bool()] if values.dim() > 2 else values[row]


def weighted(rows: list[Tensor]) -> Tensor:
    generator = torch.Generator().manual_seed(3)
    return torch.stack([(values * torch.randn(values.shape, generator=generator)).sum() for values in rows]).sum()


def outcome(name: str) -> str:
    """ "exact (layout)", "refused: ..", "wrong: ..", or "not built: .." """
    try:
        model = model_types.build(name)
    except model_types.NotTiny as reason:
        return f"not built: {reason}"
    try:
        case = HeadUnderTest(model)
    except Exception as error:
        try:
            spf.SoftPromptModel(model, train_head=False)
        except TypeError as refusal:
            return f"refused: {refusal}"
        return f"not built: not runnable on token ids: {type(error).__name__}: {str(error)[:150]}"
    return outcome_of(compare, case)  # type: ignore[arg-type]


def main() -> int:
    parser = argparse.ArgumentParser()
    parser.add_argument("types", nargs="*", help='such as "llama"; all if none is given')
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    logging.disable(logging.WARNING)
    tf.logging.set_verbosity_error()
    found, started = Counter[str](), time.perf_counter()
    for name in every_head():
        if arguments.types and name.split(":")[1] not in arguments.types:
            continue
        result = outcome(name)
        found[result.split(":")[0].split(";")[0].split(" (")[0]] += 1
        print(f"{name:45} {result[:200]}", flush=True)
        gc.collect()
    print(f"{sum(found.values())} heads in {time.perf_counter() - started:.0f} s:", dict(found))
    return 1 if found["wrong"] else 0


if __name__ == "__main__":
    sys.exit(main())
