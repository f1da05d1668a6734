"""``assemble`` against its definition, written as loops over rows and slots. Knows neither the kernels nor the twin."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from hypothesis import given, settings
from support.op_cases import Case, cases, same_bits
from torch import Tensor

from softprompt_fast.ops.extension import backend


@dataclass
class Slot:
    """One place of the output: a vector of a prompt, a token, or padding (neither)."""

    vector: Tensor | None = None
    label: int = -100
    position: int = 0
    row: int = -1


def prompt_slots(case: Case, number: int) -> list[Slot]:
    if number == -1:
        return []
    vectors = case.prompts[int(case.prompt_offsets[number]) : int(case.prompt_offsets[number + 1])]
    return [Slot(vector.to(case.embedding.dtype), position=n) for n, vector in enumerate(vectors)]


def text_slots(case: Case, row: int, first_position: int) -> list[Slot]:
    wide = torch.float64 if case.embedding.dtype == torch.float64 else torch.float32
    update = case.token_update()
    slots: list[Slot] = []
    for column, real in enumerate(case.real()[row]):
        if not real:
            continue
        vector = case.embedding[int(case.input_ids[row, column])]
        wider = vector.to(wide) * case.options["embedding_scale"]
        if update is not None and case.prompt_of(row) != -1 and len(slots) < update.shape[1]:
            wider = wider + update[case.prompt_of(row), len(slots)]
        vector = wider.to(vector.dtype)
        label = -100 if case.labels is None else int(case.labels[row, column])
        slots.append(Slot(vector, label, first_position + len(slots), row))
    return slots


def padded(case: Case) -> list[list[Slot]]:
    """Rows of slots; those of padding hold no vector."""
    rows = []
    used = []
    for row in range(len(case.input_ids)):
        prompt = prompt_slots(case, case.prompt_of(row))
        used.append(len(prompt))
        rows.append(prompt + text_slots(case, row, len(prompt)))
    width = case.input_ids.shape[1] + case.options.get("max_prompt_length", max(used, default=0))
    for slots in rows:
        padding = [Slot() for _ in range(width - len(slots))]
        slots[:] = padding + slots if case.options["padding_side"] == "left" else slots + padding
    return rows


def packed(case: Case) -> tuple[list[Slot], list[int]]:
    """The one sequence, and the lengths of its segments."""
    chosen = [case.prompt_of(row) for row in range(len(case.input_ids))]
    distinct = [n for place, n in enumerate(chosen) if n != -1 and n not in chosen[:place]]
    segments = [prompt_slots(case, n) for n in distinct]
    segments += [text_slots(case, row, len(prompt_slots(case, n))) for row, n in enumerate(chosen)]
    return [slot for segment in segments for slot in segment], [len(segment) for segment in segments]


def sees(case: Case, slots: list[Slot], query: int, key: int) -> bool:
    if slots[query].vector is None or slots[key].vector is None:
        return query == key and slots[query].vector is None
    window = case.options["sliding_window"] or 10**9
    if case.options["causal"]:
        return 0 <= query - key < window
    return abs(query - key) <= window


def expected_mask(case: Case, rows: list[list[Slot]], width: int) -> Tensor | None:
    kind = case.options["mask_format"]
    if kind == "none":
        return None
    if kind == "2d":
        dtype = torch.int64 if case.attention_mask is None else case.attention_mask.dtype
        filled = [[slot.vector is not None for slot in slots] for slots in rows]
        return torch.tensor(filled, dtype=torch.bool).reshape(len(rows), width).to(dtype)
    seen = [[[sees(case, slots, q, k) for k in range(width)] for q in range(width)] for slots in rows]
    mask = torch.tensor(seen, dtype=torch.bool).reshape(len(rows), 1, width, width)
    if kind == "4d_bool":
        return mask
    lowest = torch.finfo(case.embedding.dtype).min
    return torch.zeros(mask.shape, dtype=case.embedding.dtype).masked_fill(~mask, lowest)


@settings(max_examples=400)
@given(cases(max_tokens=6))
def test_equals_its_definition(backend_name: str, case: Case) -> None:
    batch = case.run(backend.native_ops())
    rows, width = len(case.input_ids), batch.inputs_embeds.shape[1]
    if case.options["layout"] == "padded":
        table = padded(case)
        assert all(len(slots) == width for slots in table)
        mask = expected_mask(case, table, width)
        assert (mask is None and batch.attention_mask is None) or same_bits(mask, batch.attention_mask)
        lead = (rows, width)
    else:
        slots, lengths = packed(case)
        table, lead = [slots], (1, len(slots))
        assert batch.attention_mask is None
        assert batch.packed.lengths == lengths
        assert batch.packed.cu_seqlens.tolist() == [sum(lengths[:n]) for n in range(len(lengths) + 1)]
        assert batch.packed.row_ids.tolist() == [slot.row for slot in slots]
    flat = [slot for slots in table for slot in slots]
    zeros = torch.zeros(case.embedding.shape[1], dtype=case.embedding.dtype)
    vectors = [zeros if slot.vector is None else slot.vector for slot in flat]
    embeds = torch.stack(vectors) if vectors else zeros.new_zeros(0)
    assert same_bits(batch.inputs_embeds, embeds.reshape(*lead, len(zeros)))
    assert batch.position_ids.tolist() == torch.tensor([slot.position for slot in flat]).reshape(lead).tolist()
    if case.labels is not None:
        assert batch.labels.dtype == case.labels.dtype
        assert batch.labels.tolist() == torch.tensor([slot.label for slot in flat]).reshape(lead).tolist()
    for row, real in enumerate(case.real()):  # each token's slot, in order
        own = [at for at, slot in enumerate(flat) if slot.row == row]
        assert batch.token_slots[row].tolist() == [own.pop(0) if one else -1 for one in real]
