"""Steps of ``generate`` that run as CUDA graphs, played on the CPU as ``support/played_decoding.py`` says."""

from __future__ import annotations

import copy
import inspect
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any
from unittest import mock

import pytest
import torch
import transformers as tf
from support.played_decoding import PlayedSteps, played_steps
from support.rows_alone import ROWS, tuned_model
from support.tiny_models import LLAMA, batch, build
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.compiled import decode_graph, decoding
from softprompt_fast.compiled.cache import CompiledCache, additive_mask
from softprompt_fast.compiled.continuation import Continuation
from softprompt_fast.compiled.decoding import CHECKED_STEPS, EAGER_STEPS, LEAST_LEFT, DecodeGraphs
from softprompt_fast.inference import PromptBank
from softprompt_fast.inference.engine import Engine

NAMES = ["llama", "mistral-window", "qwen3", "gemma2", "gemma3", "phi3", "gpt2", "opt", "gpt-neox", "cohere"]
NEW = 20
GREEDY: dict[str, Any] = {"max_new_tokens": NEW, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
STEPS = NEW - 1
"""Passes after the one that reads the text."""


@pytest.fixture(autouse=True)
def played() -> Iterator[type[PlayedSteps]]:
    with played_steps() as steps:
        yield steps


def pair(name: str = "llama") -> tuple[spf.SoftPromptModel, spf.SoftPromptModel]:
    """A model whose steps run as graphs, and the same without."""
    with_graphs = tuned_model(name)
    return with_graphs, spf.SoftPromptModel(with_graphs.base_model, with_graphs.prompts, cuda_graphs=False)


def texts(shorter: int = 0) -> tuple[Tensor, Tensor]:
    """Rows of different lengths, the longest of which is `shorter` than in other calls."""
    torch.manual_seed(3)
    ids, mask = batch(padding="left")
    return ids[:, shorter:], mask[:, shorter:]


def assert_same(models: Any, shorter: int = 0, **options: Any) -> Any:
    """Both models generate the same; returns it."""
    found = []
    for model in models:
        torch.manual_seed(7)
        found.append(model.generate(*texts(shorter), ROWS, **(GREEDY | options)))
    tokens = [x if isinstance(x, Tensor) else x.sequences for x in found]
    assert all(torch.equal(tokens[0], other) for other in tokens)
    return found[0]


def graphs_of(model: spf.SoftPromptModel) -> DecodeGraphs:
    continuation = model._generator.continuation
    assert continuation is not None and continuation.graphs is not None
    return continuation.graphs


@pytest.mark.parametrize("name", NAMES)
def test_tokens_equal_those_without_graphs(played: type[PlayedSteps], name: str) -> None:
    models = pair(name)
    assert_same(models)
    assert (played.captured, played.replays) == (1, STEPS - EAGER_STEPS), graphs_of(models[0]).stopped
    assert_same(models, shorter=2, do_sample=True, max_new_tokens=NEW + 3)
    assert (played.captured, played.replays) == (1, 2 * STEPS - EAGER_STEPS + 3), "the graph serves another length"
    assert "forward" not in models[0].base_model.__dict__


@pytest.mark.parametrize("name", ["llama", "gemma3"])
def test_a_text_may_outgrow_a_graph(played: type[PlayedSteps], name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "GROWTH", 8)
    monkeypatch.setattr(decoding, "HORIZON", 8)
    models = pair(name)
    assert_same(models, max_new_tokens=60)
    assert played.captured >= 5 and played.replays > 45
    before = played.captured
    assert_same(models, max_new_tokens=60)
    assert played.captured == before


def test_a_call_may_go_on_for_longer_than_it_said(played: type[PlayedSteps], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "GROWTH", 8)
    models = pair()
    original = DecodeGraphs.decoding

    def wrong(self: Any, model: Any, width: int, options: dict[str, Any], check: bool) -> Any:
        return original(self, model, width, options | {"max_new_tokens": LEAST_LEFT + 3}, check)

    monkeypatch.setattr(DecodeGraphs, "decoding", wrong)
    assert_same(models, max_new_tokens=60)
    assert 0 < played.replays < 30


def test_answers_of_a_few_tokens_run_as_usual(played: type[PlayedSteps]) -> None:
    assert_same(pair(), max_new_tokens=LEAST_LEFT)
    assert played.captured == 0


def test_rows_may_end_early(played: type[PlayedSteps]) -> None:
    models = pair()
    free = assert_same(models)
    ends = free[:, texts()[0].shape[1] + 8].tolist()
    ended = assert_same(models, eos_token_id=ends)
    assert ended.shape[1] < free.shape[1] and played.replays


def test_several_answers_for_each_row(played: type[PlayedSteps]) -> None:
    assert assert_same(pair(), do_sample=True, num_return_sequences=3).shape[0] == 3 * len(ROWS)
    assert played.replays == STEPS - EAGER_STEPS


def test_scores_and_processors(played: type[PlayedSteps]) -> None:
    models = pair()
    options = {"output_scores": True, "output_logits": True, "return_dict_in_generate": True, "repetition_penalty": 1.5}
    found = assert_same(models, **options)
    torch.manual_seed(7)
    expected = models[1].generate(*texts(), ROWS, **GREEDY, **options)
    assert played.replays and len(found.scores) == NEW
    for name in ("scores", "logits"):
        for one, other in zip(found[name], expected[name], strict=True):
            assert torch.allclose(one, other, atol=1e-4)


def test_a_returned_cache_stays_as_it_is(played: type[PlayedSteps]) -> None:
    models = pair()
    caches = [assert_same(models, shorter, return_dict_in_generate=True).past_key_values for shorter in (0, 1)]
    assert played.captured == 1 and caches[0].decoding is None
    assert_same(models)
    for shorter, cache in enumerate(caches):
        expected = models[1].generate(*texts(shorter), ROWS, **GREEDY, return_dict_in_generate=True).past_key_values
        for layer, other in zip(cache.layers, expected.layers, strict=True):
            assert layer.get_seq_length() == other.get_seq_length() == texts(shorter)[0].shape[1] + STEPS
            assert layer.keys.shape == other.keys.shape
            assert torch.allclose(layer.keys, other.keys, atol=1e-5)
            assert torch.allclose(layer.values, other.values, atol=1e-5)


def test_other_modes_of_generation_run_as_usual(played: type[PlayedSteps]) -> None:
    models = pair()
    assistant = build("llama")
    assert_same(models, num_beams=3)
    assert_same(models, output_hidden_states=True, return_dict_in_generate=True)
    for row in range(2):
        ids, mask = (x[row : row + 1, 2:] for x in texts())
        for options in ({"assistant_model": assistant}, {"prompt_lookup_num_tokens": 3}):
            found = [model.generate(ids, mask, ROWS[row : row + 1], **GREEDY, **options) for model in models]
            assert torch.equal(*found)
    assert played.captured == 0


def test_models_have_graphs_of_their_own(played: type[PlayedSteps]) -> None:
    models, others = pair(), pair()
    with torch.no_grad():
        for parameter in others[0].base_model.parameters():
            parameter.mul_(1.1)
    first, second = assert_same(models), assert_same(others)
    assert played.captured == 2 and not torch.equal(first, second)
    assert torch.equal(assert_same(models), first) and torch.equal(assert_same(others), second)
    assert torch.equal(assert_same((copy.deepcopy(models[0]), models[1])), first)
    assert played.captured == 3


def in_place(model: Any) -> None:
    model.model.layers[0].mlp.up_proj.weight.data.mul_(2)


def replaced(model: Any) -> None:
    layer = model.model.layers[0].mlp.up_proj
    layer.weight = torch.nn.Parameter(layer.weight.detach() * 2, requires_grad=False)


@pytest.mark.parametrize("change", [in_place, replaced])
def test_changed_weights_are_seen(played: type[PlayedSteps], change: Callable[[Any], None]) -> None:
    models = pair()
    before = assert_same(models)
    change(models[0].base_model)
    assert not torch.equal(assert_same(models), before)
    assert played.replays > STEPS


def test_hooks_run_in_every_step(played: type[PlayedSteps]) -> None:
    models = pair()
    called: list[int] = []
    handle = models[0].base_model.model.layers[0].register_forward_hook(lambda *_: called.append(1))
    assert_same(models[:1])
    assert len(called) >= NEW and played.captured == 0
    handle.remove()
    assert_same(models)
    assert played.captured == 1
    top = models[0].base_model.register_forward_hook(lambda *_: called.append(1))
    before, replays = len(called), played.replays
    assert_same(models)
    assert len(called) == before + 2 * NEW and played.replays == replays
    top.remove()


class Watching(tf.generation.BaseStreamer):
    """Keeps tokens, and does something once, after a number of them."""

    def __init__(self, after: int = 0, act: Callable[[], Any] = lambda: None) -> None:
        self.tokens: list[Tensor] = []
        self.after, self.act = after, act

    def put(self, value: Tensor) -> None:
        self.tokens.append(value.clone())
        if len(self.tokens) == self.after:
            self.act()

    def end(self) -> None:
        pass


def one_row(model: spf.SoftPromptModel, streamer: Watching | None = None) -> Tensor:
    ids, mask = texts()
    result: Tensor = model.generate(ids[:1], mask[:1], ROWS[:1], **GREEDY, streamer=streamer)
    return result


def test_a_streamer_gets_every_token(played: type[PlayedSteps]) -> None:
    with_graphs, without = pair()
    streamer = Watching()
    found = one_row(with_graphs, streamer)
    assert torch.equal(found, one_row(without)) and played.replays
    assert torch.equal(torch.cat([x.flatten() for x in streamer.tokens]), found[0])


def test_a_hook_that_comes_meanwhile_is_called(played: type[PlayedSteps]) -> None:
    with_graphs, without = pair()
    called: list[int] = []
    layer = with_graphs.base_model.model.layers[0]
    streamer = Watching(10, lambda: layer.register_forward_hook(lambda *_: called.append(1)))
    found = one_row(with_graphs, streamer)
    assert 0 < played.replays < STEPS - EAGER_STEPS
    assert len(called) == 1 + NEW - 10  # the first thing that a streamer gets is the text
    assert torch.equal(found, one_row(without))


def test_a_call_within_a_call_does_not_take_its_cache(played: type[PlayedSteps]) -> None:
    with_graphs, without = pair()
    expected, inner = one_row(without), []
    found = one_row(with_graphs, Watching(8, lambda: inner.append(one_row(with_graphs))))
    assert torch.equal(found, expected) and torch.equal(inner[0], expected)
    assert (played.captured, played.replays) == (1, STEPS - EAGER_STEPS)
    assert torch.equal(one_row(with_graphs), expected)
    assert played.captured == 1


REARRANGED: dict[str, Callable[[CompiledCache], Any]] = {
    "reordered": lambda cache: cache.reorder_cache(torch.zeros(1, dtype=torch.int64)),
    "selected": lambda cache: cache.batch_select_indices(torch.tensor([0])),
    "grown": lambda cache: [layer.hold([x.clone() for x in layer.stored], layer.length) for layer in cache.layers],
}


@contextmanager
def kept_caches(caches: list[CompiledCache]) -> Iterator[None]:
    original = Continuation._cache

    def kept(*arguments: Any) -> CompiledCache:
        caches.append(original(*arguments))
        return caches[-1]

    with mock.patch.object(Continuation, "_cache", kept):
        yield


@pytest.mark.parametrize("how", REARRANGED)
def test_a_cache_that_is_rearranged_meanwhile_goes_on_as_usual(played: type[PlayedSteps], how: str) -> None:
    with_graphs, without = pair()
    caches: list[CompiledCache] = []
    with kept_caches(caches):
        found = one_row(with_graphs, Watching(10, lambda: REARRANGED[how](caches[-1])))
    assert torch.equal(found, one_row(without)) and 0 < played.replays < STEPS - EAGER_STEPS


def test_a_shortened_cache_goes_on_as_a_graph(played: type[PlayedSteps]) -> None:
    """Slots behind the text hold what was removed, and the mask hides it."""
    models, results = pair(), []
    for model in models:
        caches: list[CompiledCache] = []
        with kept_caches(caches):
            results.append(one_row(model, Watching(12, lambda: caches[-1].crop(-3))))  # noqa: B023
    assert played.replays == STEPS - EAGER_STEPS
    assert torch.equal(*results) and not torch.equal(results[0], one_row(models[0]))


def test_what_cannot_be_captured_runs_as_usual_and_is_said_once(
    played: type[PlayedSteps], caplog: pytest.LogCaptureFixture
) -> None:
    models = pair("mixtral")  # the chosen experts of the tiny model are read on the host
    with caplog.at_level(logging.WARNING):
        assert_same(models)
        assert_same(models)
    said = [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()]
    assert len(said) == 1 and said[0].startswith("MixtralForCausalLM does not decode as CUDA graphs: RuntimeError: ")
    assert played.captured == 1 and played.replays == 0


def test_a_graph_that_gives_other_logits_is_not_used(
    played: type[PlayedSteps], caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pair()
    original = PlayedSteps.replay
    monkeypatch.setattr(PlayedSteps, "replay", lambda self: original(self) * 1.01)
    with caplog.at_level(logging.WARNING):
        assert_same(models)
    assert "does not decode as CUDA graphs: logits differ by" in caplog.text
    assert played.replays == 1 <= CHECKED_STEPS


def test_an_attention_that_does_not_read_the_cache_is_noticed(
    played: type[PlayedSteps], monkeypatch: pytest.MonkeyPatch
) -> None:
    models = pair()

    def unread(self: Any, module: Any, query: Tensor, *arguments: Any, **keywords: Any) -> Any:
        return query.transpose(1, 2), None

    monkeypatch.setattr(decode_graph.FixedLayer, "attend", unread)
    assert_same(models)
    assert played.replays == 0
    assert graphs_of(models[0]).stopped == "Unsupported: its attention does not read what it has cached"


@pytest.mark.parametrize("what", ["autocast", "replaced forward", "dispatch mode"])
def test_calls_that_a_graph_cannot_repeat_run_as_usual(played: type[PlayedSteps], what: str) -> None:
    models = pair()
    base = models[0].base_model
    original, called = base.forward, []
    if what == "replaced forward":

        def mine(**keywords: Any) -> Any:
            called.append(1)
            return original(**keywords)

        mine.__signature__ = inspect.signature(original)  # type: ignore[attr-defined]
        base.forward = mine
    if what == "dispatch mode":
        from torch.utils.flop_counter import FlopCounterMode

        with FlopCounterMode(display=False) as counter:
            assert_same(models[:1])
        assert counter.get_total_flops() > 0
    else:
        with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
            assert_same(models)
    assert played.captured == 0
    assert not called or (base.__dict__["forward"] is mine and len(called) >= 2 * NEW)


def test_graphs_can_be_turned_off(played: type[PlayedSteps]) -> None:
    _, without = pair()
    assert without._generator.continuation is not None and without._generator.continuation.graphs is None
    with mock.patch.object(decoding, "steps_as_graphs", side_effect=AssertionError):
        without.generate(*texts(), ROWS, **GREEDY)
    assert played.captured == 0


def test_a_call_that_fails_leaves_no_trace(played: type[PlayedSteps]) -> None:
    with_graphs, without = pair()

    def fail() -> None:
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        one_row(with_graphs, Watching(10, fail))
    base = with_graphs.base_model
    assert played.replays and "forward" not in base.__dict__ and not base._forward_pre_hooks
    assert torch.equal(one_row(with_graphs), one_row(without)) and played.captured == 1


def test_inference_mode_or_none(played: type[PlayedSteps]) -> None:
    models = pair()
    for context in (torch.inference_mode, torch.no_grad, torch.inference_mode):
        with context():
            assert_same(models)
    assert played.captured == 1


def test_memory_for_graphs_has_a_limit(played: type[PlayedSteps], monkeypatch: pytest.MonkeyPatch) -> None:
    models = pair()
    heads, size = LLAMA["num_key_value_heads"], LLAMA["head_dim"]
    one = 2 * LLAMA["num_hidden_layers"] * len(ROWS) * 64 * heads * size * 4
    monkeypatch.setattr(decoding, "most_memory", lambda device: one - 1)
    assert_same(models)
    assert played.captured == 0
    monkeypatch.setattr(decoding, "most_memory", lambda device: one)
    assert_same(models)
    assert played.captured == 1 and len(graphs_of(models[0])) == 1
    ids, mask = (x[:2] for x in texts())
    found = [model.generate(ids, mask, ROWS[:2], **GREEDY) for model in models]
    assert torch.equal(*found) and played.captured == 2 and len(graphs_of(models[0])) == 1


def test_the_oldest_graph_makes_room(played: type[PlayedSteps], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(decoding, "MOST_GRAPHS", 2)
    models = pair()
    for rows in (1, 2, 3, 2, 1):
        ids, mask = (x[:rows] for x in texts())
        assert torch.equal(*(model.generate(ids, mask, ROWS[:rows], **GREEDY) for model in models))
        assert len(graphs_of(models[0])) <= 2
    assert played.captured == 4


def test_a_prompt_bank_generates_with_graphs(played: type[PlayedSteps]) -> None:
    found = []
    for model in pair():
        bank = PromptBank(model)
        ids, mask = texts()
        rows = [row[real.bool()].tolist() for row, real in zip(ids, mask, strict=True)]
        with bank.use(ROWS) as view:
            found.append(Engine(bank).generate(view, rows, ROWS, GREEDY))
    assert torch.equal(*found) and played.captured == 1


@pytest.mark.parametrize("window", [0, 4])
def test_a_mask_of_more_slots_hides_what_lies_behind_the_text(window: int) -> None:
    virtual, padding = torch.tensor([3, 0, 4]), torch.tensor([0, 2, 1])
    for length in (3, 8):
        short = additive_mask(virtual, padding, 4, length, 4 + length, 1, window, torch.float32)
        places = torch.tensor([4]), torch.tensor([length])
        wide = additive_mask(virtual, padding, *places, 20, 1, window, torch.float32)
        assert torch.equal(wide[..., : 4 + length], short)
        assert bool((wide[..., 4 + length :] < -1e30).all())
