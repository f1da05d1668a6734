"""The cache that hides compiled prompts, by itself."""

from __future__ import annotations

import pytest
import torch

from softprompt_fast.base.errors import Unsupported
from softprompt_fast.compiled.cache import CompiledCache, Layer, RowPlaces

COMPILED = torch.randn(3, 2, 9, 2, 8)
PREFIXES = torch.tensor([[2, 3], [0, 0], [5, 4]])
PADDING = torch.tensor([0, 2, 1])


class Attention(torch.nn.Module):
    is_causal = True


def places() -> RowPlaces:
    return RowPlaces(COMPILED, PREFIXES, PADDING)


def states(rows: int, new: int) -> tuple[torch.Tensor, torch.Tensor]:
    return torch.randn(rows, 2, new, 8), torch.randn(rows, 2, new, 8)


def attend(layer: Layer, rows: int, new: int, **options: float) -> torch.Tensor:
    torch.manual_seed(new)
    return layer.attend(Attention(), torch.randn(rows, 4, new, 8), layer.keys, layer.values, **options)[0]


@pytest.fixture(params=["in place", "copied"])
def reading(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> str:
    """How attention reads prompts: in the table, or copied before each row's text as on a GPU."""
    if request.param == "copied":
        monkeypatch.setattr("softprompt_fast.compiled.cache.available", lambda query: False)
    return str(request.param)


@pytest.mark.parametrize("window", [None, 3])
def test_reading_in_place_equals_reading_copies(window: int | None, monkeypatch: pytest.MonkeyPatch) -> None:
    options = {"sliding_window": window} if window else {}
    steps = [states(3, 5), *(states(3, 1) for _ in range(70)), states(3, 2)]  # more than a layer has room for at first
    found = []
    for in_place in (True, False):
        if not in_place:
            monkeypatch.setattr("softprompt_fast.compiled.cache.available", lambda query: False)
        layer, results = Layer(places(), 1), []
        for step in steps:
            layer.update(*step)
            results.append(attend(layer, 3, step[0].shape[2], **options))
        assert layer.front == (0 if in_place else 4)
        found.append(torch.cat(results, 1))
    for row, padding in enumerate(PADDING.tolist()):
        assert torch.allclose(found[0][row, padding:], found[1][row, padding:], atol=1e-5)


def test_each_row_begins_with_a_copy_of_its_prompt(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("softprompt_fast.compiled.cache.available", lambda query: False)
    layer = Layer(places(), 1)
    text = states(3, 5)
    layer.update(*text)
    attend(layer, 3, 5)
    layer.update(*states(3, 1))
    keys, values = layer.stored
    assert torch.equal(keys[0, :3], COMPILED[1, 0, 2:5]) and not keys[0, 3].any()
    assert torch.equal(values[2, :4], COMPILED[1, 1, 5:9]) and not values[1, :4].any()
    assert torch.equal(layer.keys[:, :, :5], text[0]) and torch.equal(keys[:, 4:9].transpose(1, 2), text[0])


def test_length_counts_text_and_a_mask_is_for_text() -> None:
    cache = CompiledCache(places())
    assert cache.get_seq_length() == 0 and cache.get_mask_sizes(5, 0) == (5, 0)
    cache.update(*states(3, 5), 0)
    assert cache.get_seq_length() == 5 and cache.get_mask_sizes(1, 0) == (6, 0)
    layer = cache.layers[0]
    assert layer.get_mask_sizes(torch.arange(2)) == (7, 0)
    assert layer.get_max_length() == layer.get_max_cache_shape() == -1
    assert cache.is_croppable and not any(cache.is_sliding)


def test_removed_tokens_are_not_read(reading: str) -> None:
    layer, other = Layer(places(), 0), Layer(places(), 0)
    first, guessed, last = states(3, 5), states(3, 3), states(3, 1)
    layer.update(*first)
    attend(layer, 3, 5)
    layer.update(*guessed)
    attend(layer, 3, 3)
    layer.crop(-3)
    assert layer.get_seq_length() == 5
    layer.update(*last)
    other.update(*first)
    attend(other, 3, 5)
    other.update(*last)
    assert torch.equal(attend(layer, 3, 1), attend(other, 3, 1))
    layer.crop(2)  # the length to keep
    assert layer.get_seq_length() == 2
    layer.reset()
    assert layer.get_seq_length() == 0


def test_rows_are_repeated_and_selected(reading: str) -> None:
    first, last = states(3, 5), states(3, 1)
    plain = Layer(places(), 0)
    plain.update(*first)
    attend(plain, 3, 5)
    plain.update(*last)
    query = torch.randn(3, 4, 1, 8)
    expected = plain.attend(Attention(), query, plain.keys, plain.values)[0]

    layer = Layer(places(), 0)
    layer.update(*(x.repeat_interleave(2, 0) for x in first))  # as beams bring them
    attend(layer, 6, 5)
    layer.reorder_cache(torch.tensor([1, 0, 2, 2, 5, 4]))
    layer.batch_select_indices(torch.tensor([0, 2, 4]))
    layer.update(*last)
    assert torch.equal(layer.attend(Attention(), query, layer.keys, layer.values)[0], expected)
    layer.batch_repeat_interleave(2)
    layer.update(*(x.repeat_interleave(2, 0) for x in states(3, 1)))
    assert layer.keys.shape == (6, 2, 7, 8)


def test_the_row_of_the_longest_prompt_may_leave(reading: str) -> None:
    layer, alone = Layer(places(), 0), Layer(RowPlaces(COMPILED, PREFIXES[:2], PADDING[:2]), 0)
    first, last = states(3, 5), states(2, 1)
    layer.update(*first)
    attend(layer, 3, 5)
    layer.batch_select_indices(torch.tensor([0, 1]))
    alone.update(*(x[:2] for x in first))
    attend(alone, 2, 5)
    for one in (layer, alone):
        one.update(*last)
    assert torch.allclose(attend(layer, 2, 1), attend(alone, 2, 1), atol=1e-6)


def test_an_attention_that_does_not_read_the_cache_is_noticed() -> None:
    layer = Layer(places(), 0)
    layer.update(*states(3, 5))
    with pytest.raises(Unsupported, match="does not read"):
        layer.update(*states(3, 1))
