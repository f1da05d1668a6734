"""Text generation through transformers' own ``generate``, which sees the ids of texts and nothing else.

Prompts are in the cache (``compiled/continuation.py``) or enter with the first call of the model
(:func:`generate_with_prompt_vectors`). So lengths, penalties, n-grams, stopping and speculative decoding work on the
text, as for the plain model.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Hashable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from .architecture import first_position, forward_parameters, without_adapters
from .generation_options import TOKEN_TYPES, setting

PER_ROW = ("negative_prompt_ids", "negative_prompt_attention_mask")
PERMUTATIONS = ("perm_mask", "target_mapping")
SPECULATIVE = ("prompt_lookup_num_tokens", "assistant_model")

Run = Callable[[list[int], Tensor, Tensor, dict[str, Any]], Any]
"""Runs ``generate`` for some rows: their places in the batch, ids, mask (padding on the left) and options."""


def generate_rows(
    model: Any, input_ids: Tensor, attention_mask: Tensor, options: dict[str, Any], keys: Sequence[Hashable], run: Run
) -> Any:
    """Runs rows in groups and puts the results together.

    Args:
        input_ids, attention_mask: [B, T], padding anywhere.
        keys: rows of one key run together. Padding holds the row's own first token, so that a penalty on repeated
            tokens affects no token that the row does not contain.

    Returns:
        ``input_ids`` followed by the new tokens. With ``return_dict_in_generate`` the output of ``generate``; if there
        are several groups, only its sequences, scores and logits.
    """
    groups: dict[Hashable, list[int]] = {}
    for row, key in enumerate(keys):
        groups.setdefault(key, []).append(row)
    if not groups:
        return input_ids
    if len(groups) > 1 and options.get("streamer") is not None:
        raise ValueError("`streamer` cannot be combined with rows of several prompts or lengths; give one row")
    mask = (attention_mask != 0).long()
    order = mask.argsort(dim=1, stable=True)
    ids, mask = input_ids.gather(1, order), mask.gather(1, order)
    types = options.get(TOKEN_TYPES)
    if types is not None:
        if types.shape != input_ids.shape:
            shapes = f"{list(input_ids.shape)}, got {list(types.shape)}"
            raise ValueError(f"`{TOKEN_TYPES}` must have the shape of input_ids {shapes}")
        types = types.gather(1, order)
    outputs, widths = [], []
    for rows in groups.values():
        index = torch.tensor(rows, device=ids.device)
        own = mask[index]
        width = int(own.sum(1).max()) if own.shape[1] else 0
        own, texts = own[:, own.shape[1] - width :], ids[index, ids.shape[1] - width :]
        if width:
            texts = torch.where(own == 1, texts, texts.gather(1, own.argmax(1, keepdim=True)))
        settings = _of_rows(options, rows, len(ids))
        if types is not None:
            settings[TOKEN_TYPES] = types[index, ids.shape[1] - width :]
        outputs.append(run(rows, texts, own, settings))
        widths.append(width)
    return _joined(model, input_ids, list(groups.values()), widths, outputs, options)


def _of_rows(options: dict[str, Any], rows: list[int], count: int) -> dict[str, Any]:
    """The options for some of a batch's rows."""
    options = dict(options)
    if rows == list(range(count)):
        return options
    for name in PER_ROW:
        if options.get(name) is not None:
            options[name] = options[name][torch.tensor(rows, device=options[name].device)]
    allowed = options.get("prefix_allowed_tokens_fn")
    if allowed is not None:
        options["prefix_allowed_tokens_fn"] = lambda row, ids: allowed(rows[row], ids)
    return options


def _joined(
    model: Any,
    input_ids: Tensor,
    groups: list[list[int]],
    widths: list[int],
    outputs: list[Any],
    options: dict[str, Any],
) -> Any:
    """One result for all groups; see :func:`generate_rows`."""
    plain = isinstance(outputs[0], Tensor)
    sequences = [output if plain else output.sequences for output in outputs]
    new = [rows[:, width:] for rows, width in zip(sequences, widths, strict=True)]
    pad = setting(model, options, "pad_token_id")
    if pad is None:
        end = setting(model, options, "eos_token_id")
        pad = 0 if end is None else end if isinstance(end, int) else end[0]
    copies = new[0].shape[0] // len(groups[0])
    whole = torch.cat([input_ids.repeat_interleave(copies, 0), _scattered(new, groups, int(pad)).to(input_ids)], 1)
    if plain:
        return whole
    output = outputs[0]
    output.sequences = whole
    if len(groups) > 1:
        for name in output.keys() - {"sequences"}:
            parts = [getattr(each, name) for each in outputs]
            if name == "sequences_scores":
                output[name] = _scattered(parts, groups, 0)
            elif name in ("scores", "logits"):
                steps = range(max(len(part) for part in parts))
                output[name] = tuple(
                    _scattered([part[min(step, len(part) - 1)] for part in parts], groups, 0) for step in steps
                )
            else:
                output[name] = None
    return output


def _scattered(parts: list[Tensor], groups: list[list[int]], fill: int) -> Tensor:
    """Each group's lines at the places of its rows in the batch; shorter lines end with `fill`."""
    copies = parts[0].shape[0] // len(groups[0])
    total = sum(map(len, groups)) * copies
    width = [max(part.shape[1] for part in parts)] if parts[0].dim() > 1 else []
    whole = parts[0].new_full((total, *width), fill)
    for part, rows in zip(parts, groups, strict=True):
        places = torch.tensor([row * copies + i for row in rows for i in range(copies)], device=part.device)
        if width:
            whole[places, : part.shape[1]] = part
        else:
            whole[places] = part
    return whole


class _PromptInFront:
    """A hook before a model's forward: the call that brings a text's first token gets the prompt's vectors too.

    ``generate`` of transformers calls the model with ids of the text. In the first call they become vectors with the
    prompt in front. A model that is given its whole text in every call, one token longer each time, gets the prompt in
    every call. Other calls continue the cache; their positions and mask are moved by the prompt's length.

    Args:
        embed: ids [N, T] to vectors [N, P + T, D].
        length: P
        first: the number of a row's first position; transformers' ``generate`` begins with 0 for every model.
        continues: calls after the first bring the tokens that the cache does not hold yet.
        speculative: calls may bring any number of tokens.
    """

    def __init__(
        self, embed: Callable[[Tensor], Tensor], length: int, *, first: int, continues: bool, speculative: bool
    ) -> None:
        self.embed, self.length, self.first = embed, length, first
        self.continues, self.speculative = continues, speculative
        self.width: int | None = None
        self.thread = threading.get_ident()

    def __call__(self, module: Any, args: tuple[Any, ...], keywords: dict[str, Any]) -> Any:
        ids = keywords.get("input_ids")
        if ids is None or threading.get_ident() != self.thread:
            return None
        keywords = dict(keywords)
        whole = self.width is None
        if self.width is not None and not self.speculative and ids.shape[1] == self.width + 1:
            whole = self.width > 0 or not self.continues  # one token after none may be either
        mask, positions = keywords.get("attention_mask"), keywords.get("position_ids")
        if mask is not None and mask.dim() == 2:
            keywords["attention_mask"] = torch.cat([mask.new_ones(len(mask), self.length), mask], 1)
        if positions is not None:
            positions = positions + self.length
            if whole:
                ahead = torch.arange(self.length, device=positions.device).expand(*positions.shape[:-1], self.length)
                positions = torch.cat([ahead.to(positions), positions], -1)
            positions = positions + self.first
            # After a prompt without a text transformers has no last position to continue from; the cache knows it.
            keywords["position_ids"] = positions if whole or positions.shape[-1] == ids.shape[1] else None
        places = keywords.get("cache_position")  # of transformers before 5.3
        if places is not None:
            ahead = torch.arange(self.length, device=places.device)
            keywords["cache_position"] = torch.cat([ahead, places + self.length]) if whole else places + self.length
        if whole:
            self.width = ids.shape[1]
            for name, value in keywords.items():  # token types, 0 for prompts, and languages
                if name not in ("input_ids", "attention_mask", "position_ids") and _per_token(value, ids):
                    ahead = value[:, :1].expand(-1, self.length)
                    keywords[name] = torch.cat([ahead * 0 if name == TOKEN_TYPES else ahead, value], 1)
            for name in PERMUTATIONS:
                if keywords.get(name) is not None:
                    keywords[name] = self._widened(keywords[name], ids.shape[1])
            keywords["inputs_embeds"] = self.embed(ids)
            keywords["input_ids"] = None
        return args, keywords

    def _widened(self, value: Tensor, width: int) -> Tensor:
        """XLNet's masks: [N, T, T] with equal lines, or [N, 1, T]."""
        value = F.pad(value, (self.length, 0))
        return torch.cat([value[:, :1].expand(-1, self.length, -1), value], 1) if value.shape[1] == width > 1 else value


def _per_token(value: Any, ids: Tensor) -> bool:
    return isinstance(value, Tensor) and value.shape == ids.shape


def _reads_new_tokens_only(model: Any, input_ids: Tensor) -> bool:
    """Whether a step of ``generate`` passes the model the tokens that its cache does not hold yet."""
    two = input_ids.new_ones(len(input_ids), 2)
    second = torch.ones(1, dtype=torch.int64, device=two.device)
    asked = {"next_sequence_length": 1, "cache_position": second, "use_cache": True}  # of this or an earlier version
    width: int = model.prepare_inputs_for_generation(two, **asked)["input_ids"].shape[1]
    return width == 1


def generate_with_prompt_vectors(
    model: Any, input_ids: Tensor, embed: Callable[[Tensor], Tensor], length: int, options: dict[str, Any]
) -> Any:
    """``model.generate`` of rows [B, T] without padding after one prompt of `length` vectors, for any decoder.

    Args:
        embed: ids [N, T] to vectors [N, length + T, D], the prompt in front.
    """
    inputs = {"attention_mask": torch.ones_like(input_ids)} if "attention_mask" in forward_parameters(model) else {}
    speculative = any(setting(model, options, name) is not None for name in SPECULATIVE)
    continues = setting(model, options, "use_cache") is not False and _reads_new_tokens_only(model, input_ids)
    assistant = options.get("assistant_model")
    if assistant is not None and without_adapters(assistant) is without_adapters(model):
        raise ValueError(f"`assistant_model` cannot be the same {type(model).__name__}, which runs with prompts")
    if speculative and not continues:
        reason = "it reads its whole text again in every step"
        raise ValueError(f"speculative decoding cannot be combined with {type(model).__name__}: {reason}")
    first = first_position(model)
    prompt = _PromptInFront(embed, length, first=first, continues=continues, speculative=speculative)
    hook = model.register_forward_pre_hook(prompt, with_kwargs=True)
    try:
        return model.generate(input_ids=input_ids, **inputs, **options)
    finally:
        hook.remove()
