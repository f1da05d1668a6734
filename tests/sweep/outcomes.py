"""Compares every way to run a model type with each row run alone, without padding, by the plain model.

An outcome is "exact", "refused: reason" (the library raised a TypeError or a ValueError of its own), or "wrong: ..".
"""

from __future__ import annotations

import copy
import inspect
import traceback
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import DynamicCache

import softprompt_fast as spf
from softprompt_fast.inference.engine import Engine
from softprompt_fast.inference.prompt_bank import PromptBank

LIBRARY = Path(spf.__file__).parent
TOLERANCE = 3e-4
"""Of numbers, relative to the largest: float32, and kernels for sequences of different lengths."""
PROMPTS = {"short": 2, "long": 5}
ROWS = ["long", None, "short", "long"]
TEXTS = [8, 5, 6, 3]
"""Tokens of each row."""
NEW_TOKENS = 3
LONGER = 6
"""New tokens for the question whether a plain model contradicts itself."""
MASKED_LAST: dict[str, Callable[[Any], int]] = {"xlm": lambda config: config.mask_token_id, "xlnet": lambda config: 0}
"""Types whose next token is read from a token that is appended and masked, and that token."""


class Wrong(Exception):
    """What differs."""


class TypeUnderTest:
    """A model, its prompts and a batch; and the plain model, which the library never sees."""

    def __init__(self, model: Any) -> None:
        self.fresh = model.requires_grad_(False)
        self.plain = copy.deepcopy(model)
        takes_cache = "use_cache" in inspect.signature(model.forward).parameters
        self.fixed = {"use_cache": False} if takes_cache else {}
        self.pairs = bool(getattr(model.config, "is_encoder_decoder", False))
        generator = torch.Generator().manual_seed(2)
        weight = model.get_input_embeddings().weight
        self.prompts = {
            name: torch.randn(length, weight.shape[1], generator=generator) * 0.5 for name, length in PROMPTS.items()
        }
        width = max(TEXTS)
        self.ids = torch.randint(20, min(150, len(weight)), (len(TEXTS), width), generator=generator)
        self.mask = torch.zeros_like(self.ids)
        for row, length in enumerate(TEXTS):  # padding on the left and on the right
            start = (width - length) if row % 2 else 0
            self.mask[row, start : start + length] = 1
        self.decoder = {"decoder_input_ids": self.ids[:, :4]} if self.pairs else {}
        self.weights = torch.randn(4, 64, 4096, generator=generator)
        self.scale = self._lookup_scale()

    def base(self) -> Any:
        """A copy for the library, never run before: some models keep states."""
        return copy.deepcopy(self.fresh)

    def tuned(self) -> spf.SoftPromptModel:
        tuned = spf.SoftPromptModel(self.base())
        for name, values in self.prompts.items():
            tuned.add_prompt(name, init=values)
        return tuned

    def text(self, row: int) -> Tensor:
        return self.ids[row][self.mask[row].bool()]

    def _lookup_scale(self) -> float:
        """The factor that the plain model applies to the vectors of ids only."""
        text = self.text(0)[None]
        extra = {key: value[:1] for key, value in self.decoder.items()}
        vectors = self.plain.get_input_embeddings()(text)
        with torch.no_grad():
            extra |= self.fixed
            expected = self.plain(input_ids=text, **extra).logits
            for scale in (1.0, vectors.shape[-1] ** 0.5):
                if relative(self.plain(inputs_embeds=vectors * scale, **extra).logits, expected) < TOLERANCE:
                    return scale
        return float("nan")

    def next_token(self, row: int, text: Tensor, **extra: Any) -> Tensor:
        """Logits [V] of the token after a row's text, from forward.

        XLM and XLNet read both directions. transformers asks them for a token that it appends and masks; so do we.
        """
        kind = self.plain.config.model_type
        if kind not in MASKED_LAST:
            return self.alone(row, text, **extra)[-1]
        text = torch.cat([text, torch.tensor([MASKED_LAST[kind](self.plain.config)])])
        if kind == "xlnet":
            width = len(text) + PROMPTS.get(ROWS[row] or "", 0)
            last = torch.zeros(1, 1, width).index_fill_(2, torch.tensor(width - 1), 1.0)
            extra = {"perm_mask": last.repeat(1, width, 1), "target_mapping": last, "use_mems": False}
            return self._run(row, text, None, extra)[-1]
        return self.alone(row, text, **extra)[-1]

    def alone(self, row: int, text: Tensor | None = None, prompt: Tensor | None = None, **extra: Any) -> Tensor:
        """Logits [T, V] of one row (an encoder-decoder: [T', V]), without padding; no prompt: from ids."""
        text = self.text(row) if text is None else text
        extra = {key: value[row : row + 1] for key, value in self.decoder.items()} | extra | self.fixed
        if "labels" in extra:
            extra.pop("decoder_input_ids", None)  # the model makes them
        logits = self._run(row, text, prompt, extra)
        return logits if self.pairs else logits[len(logits) - len(text) :]

    def _run(self, row: int, text: Tensor, prompt: Tensor | None, extra: dict[str, Any]) -> Tensor:
        """Logits of a row's prompt and text; no prompt: from ids."""
        name = ROWS[row]
        if name is None:
            return self.plain(input_ids=text[None], **extra).logits[0]
        vectors = self.plain.get_input_embeddings()(text[None]) * self.scale
        used = self.prompts[name] if prompt is None else prompt
        return self.plain(inputs_embeds=torch.cat([used[None].to(vectors), vectors], 1), **extra).logits[0]


def relative(got: Tensor, expected: Tensor) -> float:
    difference = ((got - expected).abs().max() / expected.abs().max().clamp(min=1e-6)).item()
    return difference if difference == difference else float("inf")


def equal(got: Tensor, expected: Tensor, what: str) -> None:
    if got.shape != expected.shape:
        raise Wrong(f"{what}: shape {list(got.shape)} instead of {list(expected.shape)}")
    difference = relative(got, expected)
    if not difference <= TOLERANCE:
        raise Wrong(f"{what}: differs by {difference:.1e}")


def forward(case: TypeUnderTest) -> str | None:
    tuned = case.tuned()
    with torch.no_grad():
        logits = tuned(case.ids, case.mask, prompt_ids=ROWS, **case.decoder).logits
        for row in range(len(ROWS)):
            real = slice(None) if case.pairs else case.mask[row].bool()
            equal(logits[row][real], case.alone(row), f"row {row}")
    return tuned.execution_report().execution


def gradient(case: TypeUnderTest) -> str | None:
    tuned = case.tuned()
    tuned.train()
    for module in tuned.modules():
        module.training = False  # no dropout
    used = {name: values.clone().requires_grad_() for name, values in case.prompts.items()}
    try:
        for row, name in enumerate(ROWS):
            alone = case.alone(row, prompt=None if name is None else used[name])
            weight = case.weights[row, : alone.shape[0], : alone.shape[1]]
            if name is not None:
                (alone * weight).sum().backward()
    except Exception as error:
        return f"the plain model has no gradient: {type(error).__name__}"
    logits = tuned(case.ids, case.mask, prompt_ids=ROWS, **case.decoder).logits
    got = torch.zeros(())
    for row in range(len(ROWS)):
        real = slice(None) if case.pairs else case.mask[row].bool()
        read = logits[row][real]
        got = got + (read * case.weights[row, : read.shape[0], : read.shape[1]]).sum()
    got.backward()
    for name, values in used.items():
        assert values.grad is not None
        equal(tuned.prompts[name].grad, values.grad, f"gradient of {name}")
    return None


@torch.no_grad()
def next_token_logits(case: TypeUnderTest) -> None:
    got = case.tuned().next_token_logits(case.ids, case.mask, ROWS)
    for row in range(len(ROWS)):
        equal(got[row], case.alone(row)[-1], f"row {row}")


@torch.no_grad()
def logits_at(case: TypeUnderTest) -> None:
    places = torch.tensor([[row, column] for row in range(len(ROWS)) for column in case.mask[row].nonzero()[:2, 0]])
    got = case.tuned().logits_at(case.ids, case.mask, ROWS, places)
    for row in range(len(ROWS)):
        equal(got[2 * row : 2 * row + 2], case.alone(row)[:2], f"row {row}")


def greedy(case: TypeUnderTest, got: Tensor) -> None:
    """Compares new tokens [B, N] with those of each row alone, which runs from the start for every token."""
    for row in range(len(ROWS)):
        follow(case, row, got[row], case.next_token)


def follow(case: TypeUnderTest, row: int, tokens: Tensor, next_token: Callable[..., Tensor]) -> None:
    """Compares new tokens [N] of a row with the likeliest ones by `next_token`, one after the other."""
    text = case.text(row)
    extra = {}
    if case.pairs:
        start = case.plain.generation_config.decoder_start_token_id
        extra["decoder_input_ids"] = torch.tensor([[start]])
    for step, token in enumerate(tokens):
        logits = next_token(row, text, **extra)
        behind = (logits.max() - logits[token]) / logits.abs().max()
        if not behind <= TOLERANCE:
            raise Wrong(f"row {row}: new token {step} is {token}, alone it is {logits.argmax()}")
        if case.pairs:
            extra["decoder_input_ids"] = torch.cat([extra["decoder_input_ids"], token.view(1, 1)], 1)
        else:
            text = torch.cat([text, token.view(1)])


@torch.no_grad()
def contradicts_itself(case: TypeUnderTest) -> bool:
    """Whether transformers' ``generate`` of the plain model gives another text than greedy steps of its forward."""
    row = ROWS.index(None)
    text, plain = case.text(row), copy.deepcopy(case.fresh)
    settings = options(case) | {"max_new_tokens": LONGER, "min_new_tokens": LONGER}
    try:
        new = plain.generate(text[None], attention_mask=torch.ones_like(text)[None], **settings)[0, -LONGER:]
    except Exception:
        return False  # then it gives no text
    try:
        follow(case, row, new, lambda *row, **extra: case.alone(*row, **extra)[-1])
    except Wrong:
        return True
    return False


def options(case: TypeUnderTest) -> dict[str, Any]:
    return {
        "max_new_tokens": NEW_TOKENS,
        "min_new_tokens": NEW_TOKENS,
        "do_sample": False,
        "num_beams": 1,
        "eos_token_id": None,
        "pad_token_id": 0,
    } | ({"use_mems": False} if case.plain.config.model_type == "xlnet" else {})  # what it remembers changes its text


@torch.no_grad()
def generate(case: TypeUnderTest) -> None:
    got = case.tuned().generate(case.ids, case.mask, ROWS, **options(case))
    greedy(case, got[:, -NEW_TOKENS:])


@torch.no_grad()
def bank_logits(case: TypeUnderTest) -> str | None:
    bank, rows = filled_bank(case)
    with bank.use(ROWS) as view:
        targets = [row[-1:] for row in rows]
        if case.pairs:
            targets = [case.ids[row, :3].tolist() for row in range(len(rows))]
            try:
                of_labels = [case.alone(row, labels=torch.tensor([t])) for row, t in enumerate(targets)]
            except Exception as error:
                return f"the plain model takes no labels: {type(error).__name__}"
        texts = rows if case.pairs else [row[:-1] for row in rows]
        for _ in range(2):  # the first batch is compared
            got = Engine(bank).target_logits(view, texts, ROWS, targets)
    at = 0
    for row, target in enumerate(targets):
        expected = of_labels[row] if case.pairs else case.alone(row, case.text(row)[:-1])[-1:]
        equal(got[at : at + len(target)], expected, f"row {row}")
        at += len(target)
    return "compiled" if bank.uncompiled is None else "not compiled"


@torch.no_grad()
def bank_generate(case: TypeUnderTest) -> None:
    bank, rows = filled_bank(case)
    with bank.use(ROWS) as view:
        got = Engine(bank).generate(view, rows, ROWS, options(case))
    greedy(case, got[:, -NEW_TOKENS:])


def filled_bank(case: TypeUnderTest) -> tuple[PromptBank, list[list[int]]]:
    bank = PromptBank(case.base())
    for name, values in case.prompts.items():
        bank.add(name, values)
    return bank, [case.text(row).tolist() for row in range(len(ROWS))]


def deep(case: TypeUnderTest) -> None:
    """Deep prompts: logits, gradient and text, on a cache that is filled by hand."""
    tuned = spf.DeepPromptModel(case.base())
    generator = torch.Generator().manual_seed(3)
    for name, length in PROMPTS.items():
        tuned.add_prompt(name, init=torch.randn(length, tuned.prompts.embedding_dim, generator=generator) * 0.5)
    used = {name: tuned.prompts[name].detach().clone().requires_grad_() for name in PROMPTS}
    layers, _, heads, size = tuned.runner.shape

    def alone(row: int, text: Tensor) -> Tensor:
        cache, name = DynamicCache(config=case.plain.config.get_text_config()), ROWS[row]
        length = 0
        if name is not None:
            length = PROMPTS[name]
            by_layer = used[name].view(1, length, 2 * layers, heads, size).permute(2, 0, 3, 1, 4).split(2)
            for layer, (key, value) in enumerate(by_layer):
                cache.update(key, value, layer)
        logits: Tensor = case.plain(input_ids=text[None], past_key_values=cache).logits[0]  # it counts positions itself
        return logits

    logits = tuned(case.ids, case.mask, prompt_ids=ROWS).logits
    got = expected = torch.zeros(())
    for row in range(len(ROWS)):
        real = case.mask[row].bool()
        values = alone(row, case.text(row))
        equal(logits[row][real], values, f"row {row}")
        weight = case.weights[row, : values.shape[0], : values.shape[1]]
        got, expected = got + (logits[row][real] * weight).sum(), expected + (values * weight).sum()
    got.backward()
    expected.backward()
    for name, values in used.items():
        assert values.grad is not None
        equal(tuned.prompts[name].grad, values.grad, f"gradient of {name}")
    with torch.no_grad():
        new = tuned.generate(case.ids, case.mask, ROWS, **options(case))[:, -NEW_TOKENS:]
        for row in range(len(ROWS)):
            text = case.text(row)
            for step in range(NEW_TOKENS):
                last = alone(row, text)[-1]
                if not (last.max() - last[new[row, step]]) / last.abs().max() <= TOLERANCE:
                    raise Wrong(f"row {row}: new token {step} is {new[row, step]}, alone it is {last.argmax()}")
                text = torch.cat([text, new[row, step].view(1)])


ENTRIES: dict[str, Callable[[TypeUnderTest], str | None]] = {
    "forward": forward,
    "gradient": gradient,
    "next_token_logits": next_token_logits,
    "logits_at": logits_at,
    "generate": generate,
    "bank_logits": bank_logits,
    "bank_generate": bank_generate,
    "deep": deep,
}
NOTE = "transformers"
"""Not an entry of the library: what the plain model itself does."""
DECODERS_ONLY = {"next_token_logits", "logits_at", "deep"}


def outcome_of(entry: Callable[[TypeUnderTest], str | None], case: TypeUnderTest) -> str:
    try:
        how = entry(case)
    except Wrong as difference:
        return f"wrong: {difference}"
    except (TypeError, ValueError) as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        if LIBRARY in Path(last.filename).parents:
            return f"refused: {error}"
        return f"wrong: {type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {error}"
    except Exception as error:
        last = traceback.extract_tb(error.__traceback__)[-1]
        return f"wrong: {type(error).__name__} at {Path(last.filename).name}:{last.lineno}: {error}"
    return f"exact ({how})" if how else "exact"


def outcomes(model: Any) -> dict[str, str]:
    """The outcome of each entry; {"model": reason} if the plain model cannot run on token ids."""
    try:
        case = TypeUnderTest(model)
    except Exception as error:
        try:
            spf.SoftPromptModel(copy.deepcopy(model))
        except TypeError as refusal:
            return dict.fromkeys(ENTRIES, f"refused: {refusal}")
        return {"model": f"not runnable on token ids: {type(error).__name__}: {str(error)[:200]}"}
    found: dict[str, str] = {}
    for name, entry in ENTRIES.items():
        if case.pairs and name in DECODERS_ONLY:
            continue
        found[name] = outcome_of(entry, case)
    if contradicts_itself(case):
        found[NOTE] = "its generate gives another text than its forward"
    return found
