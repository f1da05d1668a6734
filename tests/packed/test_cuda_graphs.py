"""Batches that run as CUDA graphs, played on the CPU: a replay runs the passes again and fills the same tensors."""

from __future__ import annotations

import copy
import logging
from collections.abc import Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from support.played_graphs import PlayedGraph, played_graphs
from support.rows_alone import ROWS, relative, tuned_model
from support.tiny_models import DECODERS, batch, build, changes_mask, own_attention
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.ops.segment_attention.ragged import host_plan
from softprompt_fast.packed import cuda_graphs
from softprompt_fast.packed.cuda_graphs import EAGER_BATCHES, GRAIN, LEAST_STEP, Sizes

SHARED = [name for name in DECODERS if not own_attention(name) and not changes_mask(name)]


@pytest.fixture
def graphs() -> Iterator[type[PlayedGraph]]:
    with played_graphs() as found:
        yield found


def tuned(name: str = "llama", *, gpu: bool = True) -> tuple[spf.SoftPromptModel, spf.SoftPromptModel]:
    """A model whose batches run as graphs, and the same without."""
    with_graphs = tuned_model(name)
    without = spf.SoftPromptModel(with_graphs.base_model, with_graphs.prompts, cuda_graphs=False)
    return with_graphs, without


def batches(count: int) -> list[tuple[Tensor, Tensor]]:
    """Batches of the same sizes: other tokens, and one token more or less in two rows."""
    made = []
    first = batch()
    for seed in range(count):
        ids, mask = (first[0] + seed) % 50, first[1].clone()
        lengths = mask.sum(1)
        mask[int(lengths.argmax()), int(lengths.max()) - 1 - seed % 2 :] = 0
        made.append((ids, mask))
    return made


def step(model: spf.SoftPromptModel, ids: Tensor, mask: Tensor) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
    model.prompts.zero_grad()
    output = model(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids=ROWS, return_logits=True)
    (output.loss + output.logits.pow(2).mean()).backward()
    gradients = {name: model.prompts[name].grad.clone() for name in ("short", "long")}
    return output.loss.detach(), output.logits.detach(), gradients


def assert_same(found: Any, expected: Any) -> None:
    assert relative(found[0], expected[0]) < 1e-5 and relative(found[1], expected[1]) < 1e-5
    for name, gradient in expected[2].items():
        assert relative(found[2][name], gradient) < 1e-5


@pytest.mark.parametrize("name", SHARED)
def test_training_steps_equal_those_without_graphs(graphs: type[PlayedGraph], name: str) -> None:
    with_graphs, without = tuned(name)
    kept, count = [], 2 * (EAGER_BATCHES + 3)
    for ids, mask in batches(count):
        expected, found = step(without, ids, mask), step(with_graphs, ids, mask)
        assert_same(found, expected)
        kept.append((found[1], found[1].clone()))
    soft_caps = getattr(with_graphs.config, "attn_logit_softcapping", None)
    assert graphs.replays >= 3 or soft_caps, "no batch ran as a graph"
    assert all(torch.equal(given, copied) for given, copied in kept), "a later batch wrote into earlier logits"


def test_inference_runs_as_graphs_of_its_own(graphs: type[PlayedGraph]) -> None:
    with_graphs, without = tuned()
    for context in (torch.no_grad, torch.inference_mode, torch.no_grad):
        for ids, mask in batches(EAGER_BATCHES + 2):
            with context():
                found, expected = (model.next_token_logits(ids, mask, ROWS) for model in (with_graphs, without))
            assert relative(found, expected) < 1e-5 and not found.requires_grad
        assert_same(*(step(model, ids, mask) for model in (with_graphs, without)))
    assert graphs.replays >= 6
    assert with_graphs.runner is not None and with_graphs.runner.graphs is not None
    assert {sizes.gradient for sizes, *_ in with_graphs.runner.graphs._graphs} >= {False}


def warm(model: spf.SoftPromptModel) -> tuple[Tensor, Tensor]:
    """After this a step of the batch that is returned runs as a graph."""
    for ids, mask in batches(2 * (EAGER_BATCHES + 1)):
        step(model, ids, mask)
    return ids, mask


def test_a_step_whose_backward_pass_is_to_come_keeps_what_it_needs(graphs: type[PlayedGraph]) -> None:
    with_graphs, without = tuned()
    warm(with_graphs)
    results, two = [], batches(2)
    for model in (with_graphs, without):
        model.prompts.zero_grad()
        losses = [model(*x, labels=x[0], prompt_ids=ROWS, return_logits=True).loss for x in two]
        with torch.no_grad():
            model.next_token_logits(*two[0], ROWS)
        (losses[0] - 3 * losses[1]).backward()
        results.append(model.prompts["long"].grad.clone())
    assert relative(*results) < 1e-5


def test_a_forgotten_step_does_not_stop_the_next(graphs: type[PlayedGraph]) -> None:
    model, _ = tuned()
    ids, mask = warm(model)
    before = graphs.replays
    for _ in range(3):
        model(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids=ROWS, return_logits=True)
    assert graphs.replays == before + 3


def test_a_second_backward_pass_is_an_error(graphs: type[PlayedGraph]) -> None:
    model, _ = tuned()
    ids, mask = warm(model)
    output = model(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids=ROWS, return_logits=True)
    output.loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match=r"one backward pass; .*cuda_graphs=False"):
        output.loss.backward()


def assert_follows(graphs: type[PlayedGraph], change: Any) -> None:
    """After a change of the base model results are those without graphs."""
    with_graphs, without = tuned()
    for model in (with_graphs, without):
        warm(model)
    assert graphs.replays
    change(with_graphs.base_model)
    for ids, mask in batches(EAGER_BATCHES + 2):
        assert_same(*(step(model, ids, mask) for model in (with_graphs, without)))


def test_changed_weights_are_seen(graphs: type[PlayedGraph]) -> None:
    def in_place(model: Any) -> None:
        model.model.layers[0].mlp.up_proj.weight.data.mul_(2)

    def replaced(model: Any) -> None:
        layer = model.model.layers[0].mlp.up_proj
        layer.weight = torch.nn.Parameter(layer.weight.detach() * 2, requires_grad=False)

    def other_module(model: Any) -> None:
        model.model.layers[0].mlp = copy.deepcopy(model.model.layers[1].mlp)

    for change in (in_place, replaced, other_module):
        assert_follows(graphs, change)


def test_python_that_a_graph_would_not_call_still_runs(graphs: type[PlayedGraph]) -> None:
    called: list[int] = []

    def hook(model: Any) -> None:
        model.model.layers[0].register_forward_hook(lambda *_: called.append(1))

    assert_follows(graphs, hook)
    assert len(called) == 2 * (EAGER_BATCHES + 2)

    factor = [1.0]

    def forward(model: Any) -> None:
        layer = model.model.layers[0].mlp
        original = layer.forward
        layer.forward = lambda x: original(x) * factor[0]

    assert_follows(graphs, forward)
    assert_follows(graphs, lambda model: factor.append(factor.pop() * 3))


def test_numbers_that_python_computes_with_may_change(graphs: type[PlayedGraph]) -> None:
    def scale(model: Any) -> None:
        model.model.layers[0].self_attn.scaling *= 3

    def rope(model: Any) -> None:
        model.model.rotary_emb.attention_scaling = 1.7

    for change in (scale, rope):
        assert_follows(graphs, change)


def test_adapters_of_peft_may_be_switched(graphs: type[PlayedGraph]) -> None:
    peft = pytest.importorskip("peft")
    adapted = peft.get_peft_model(build("llama"), peft.LoraConfig(init_lora_weights=False, target_modules=["q_proj"]))
    adapted.add_adapter("other", peft.LoraConfig(init_lora_weights=False, target_modules=["v_proj"]))
    models = [spf.SoftPromptModel(adapted, cuda_graphs=on) for on in (True, False)]
    ids, mask = batch()

    def compare() -> Tensor:
        with torch.no_grad():
            for _ in range(EAGER_BATCHES + 2):
                found, expected = (model.next_token_logits(ids, mask) for model in models)
                assert relative(found, expected) < 1e-5
        return expected

    first = compare()
    assert graphs.replays
    with adapted.disable_adapter():
        assert relative(compare(), first) > 1e-3
    adapted.set_adapter("other")
    adapted.requires_grad_(False)
    assert relative(compare(), first) > 1e-3
    for module in adapted.modules():
        if isinstance(getattr(module, "scaling", None), dict) and "other" in module.scaling:
            module.scaling["other"] *= 2
    compare()


def test_evaluation_between_steps_keeps_the_graphs(graphs: type[PlayedGraph]) -> None:
    model, _ = tuned()
    for training in (True, False):
        model.train(training)
        warm(model)
    before = graphs.replays
    for training in (True, False, True):
        model.train(training)
        step(model, *batches(2 * (EAGER_BATCHES + 1))[-1])
    assert graphs.replays == before + 3


def test_unloading_frees_the_graphs(graphs: type[PlayedGraph]) -> None:
    model, _ = tuned()
    warm(model)
    runner = model.runner
    assert runner is not None and runner.graphs is not None and len(runner.graphs)
    model.unload()
    assert not len(runner.graphs) and runner.graphs.stopped


def test_a_batch_that_does_not_fit_beside_the_graphs_runs_without_them(graphs: type[PlayedGraph]) -> None:
    model, without = tuned()
    warm(model)
    assert model.runner is not None and model.runner.graphs is not None
    original, failed = model.runner.run_once, []

    def short_of_memory(*arguments: Any) -> Any:
        if not failed:
            failed.append(True)
            raise torch.OutOfMemoryError("no room")
        return original(*arguments)

    ids, mask = (x.repeat(3, 1) for x in batch())
    with mock.patch.object(model.runner, "run_once", short_of_memory), torch.no_grad():
        found = model.next_token_logits(ids, mask, ROWS * 3)
    assert failed and not len(model.runner.graphs)
    with torch.no_grad():
        assert relative(found, without.next_token_logits(ids, mask, ROWS * 3)) < 1e-5


def test_a_graph_that_gives_other_numbers_is_not_used(
    graphs: type[PlayedGraph], caplog: pytest.LogCaptureFixture
) -> None:
    with_graphs, without = tuned()
    original = graphs.replay_backward
    with (
        caplog.at_level(logging.WARNING),
        mock.patch.object(graphs, "replay_backward", lambda *arguments: original(*arguments) * 1.5),
    ):
        for ids, mask in batches(EAGER_BATCHES + 4):
            assert_same(*(step(model, ids, mask) for model in (with_graphs, without)))
    assert "a replay differs from the model by" in caplog.text


@pytest.mark.parametrize(
    "what", ["dropout", "checkpointing", "trainable", "autocast", "hidden states", "global hook", "compiled"]
)
def test_steps_that_a_graph_cannot_repeat_run_as_usual(graphs: type[PlayedGraph], what: str) -> None:
    model, _ = tuned("gpt2" if what == "dropout" else "llama")
    if what == "dropout":
        model.config.resid_pdrop = 0.1
        model.train()
    elif what == "checkpointing":
        model.base_model.gradient_checkpointing_enable({"use_reentrant": False})
        model.train()
    elif what == "trainable":
        model.base_model.model.norm.weight.requires_grad_()
    elif what == "hidden states":
        model.config.output_hidden_states = True
    elif what == "compiled":
        model.base_model.compile(backend="eager", dynamic=True)
    elif what == "global hook":
        handle = torch.nn.modules.module.register_module_forward_hook(lambda *_: None)
    with torch.autocast("cpu", torch.bfloat16, enabled=what == "autocast"):
        for ids, mask in batches(EAGER_BATCHES + 2):
            step(model, ids, mask)
    if what == "global hook":
        handle.remove()
    assert graphs.replays == 0


def test_what_cannot_be_captured_runs_as_usual_and_is_said_once(
    graphs: type[PlayedGraph], caplog: pytest.LogCaptureFixture
) -> None:
    with_graphs, without = tuned()
    with caplog.at_level(logging.WARNING), mock.patch.object(graphs, "capture", side_effect=RuntimeError("a sync")):
        for ids, mask in batches(EAGER_BATCHES + 4):
            assert_same(*(step(model, ids, mask) for model in (with_graphs, without)))
    assert [record.getMessage() for record in caplog.records if "CUDA graphs" in record.getMessage()] == [
        "LlamaForCausalLM does not run as CUDA graphs: RuntimeError: a sync"
    ]


def test_the_oldest_graph_makes_room(graphs: type[PlayedGraph]) -> None:
    model, without = tuned()
    assert model.runner is not None and model.runner.graphs is not None
    ids, mask = batch()
    with mock.patch.object(cuda_graphs, "MOST_GRAPHS", 2):
        for _ in range(2):
            for copies in (1, 3, 9):
                wide = [x.repeat(copies, 1) for x in (ids, mask)]
                for _ in range(EAGER_BATCHES + 1):
                    with torch.no_grad():
                        pair = [m.next_token_logits(*wide, ROWS * copies) for m in (model, without)]
                    assert relative(*pair) < 1e-5
    assert len(model.runner.graphs) == 2


def test_a_copy_captures_its_own(graphs: type[PlayedGraph]) -> None:
    model, _ = tuned()
    warm(model)
    copied = copy.deepcopy(model)
    assert copied.runner is not None and copied.runner.graphs is not None and len(copied.runner.graphs) == 0
    with torch.no_grad():
        model.base_model.model.norm.weight.zero_()
    ids, mask = warm(copied)
    assert step(copied, ids, mask)[1].abs().max() > 0


LINES = st.lists(st.tuples(st.integers(1, 300), st.booleans()), min_size=1, max_size=70)


@given(LINES, st.integers(0, 100), st.integers(1, 5000))
def test_sizes_hold_a_batch_and_pad_it_little(rows: list[tuple[int, bool]], prompt: int, answers: int) -> None:
    lines, at = [(0, prompt, 0, 0)] if prompt else [], prompt
    for length, prompted in rows:
        lines.append((at, length, 0, prompt if prompted else 0))
        at += length
    sizes = Sizes.of(lines, answers, True)
    assert at <= sizes.slots <= at + max(LEAST_STEP, at // GRAIN)
    assert answers <= sizes.answers <= answers + max(LEAST_STEP, answers // GRAIN)
    padded = sizes.padded(lines)
    assert padded[: len(lines)] == lines and len(padded) == sizes.segments
    assert sum(length for _, length, *_ in padded) == sizes.slots
    assert max(length for _, length, *_ in padded) <= sizes.longest_segment
    plan = host_plan(padded)
    assert plan is not None and plan.max_keys <= sizes.longest_keys
    assert all(len(part) <= size for part, size in zip(plan.parts, sizes.parts, strict=True))
