"""A base model under torch.compile runs the packed layout: one graph for all batches, and the uncompiled results."""

from __future__ import annotations

import gc
import weakref
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support.deep_rows_alone import deep_model
from support.rows_alone import ROWS, relative, tuned_model
from support.tiny_models import LLAMA, WINDOW, batch, build
from support.varlen_stand_in import NAME, path_of_a_gpu
from torch._dynamo.utils import counters

import softprompt_fast as spf
from softprompt_fast.base.errors import Unsupported
from softprompt_fast.ops.segment_attention import varlen
from softprompt_fast.packed import traced_attention
from softprompt_fast.packed.batch import pack_rows

SIZES = [(4, 12), (4, 14), (3, 9), (3, 17), (4, 20)]
"""Rows and tokens. No packed length equals another size of the models, which torch.compile would take for the same."""


@pytest.fixture(autouse=True)
def nothing_compiled_yet() -> Iterator[None]:
    torch._dynamo.reset()
    counters.clear()
    yield
    torch._dynamo.reset()


def graphs() -> int:
    return int(counters["stats"]["unique_graphs"])


def compile_base(tuned: Any, backend: str, **options: Any) -> None:
    base = tuned.base_model
    settings: dict[str, Any] = {"fullgraph": True, "dynamic": True} | options
    base.forward = torch.compile(base.forward, backend=backend, **settings)


def step(tuned: Any, size: tuple[int, int] = SIZES[0], **options: Any) -> tuple[Any, dict[str, torch.Tensor]]:
    """The output and the prompts' gradients of one training batch."""
    torch.manual_seed(sum(size))
    ids, mask = batch(*size)
    tuned.zero_grad()
    output = tuned(ids, mask, labels=ids, prompt_ids=ROWS[: size[0]], return_logits=True, **options)
    output.loss.backward()
    return output, {name: tuned.prompts[name].grad.clone() for name in tuned.prompts.names}


def same_steps(tuned: Any, expected: Any, sizes: list[tuple[int, int]] = SIZES[:2], tolerance: float = 1e-5) -> None:
    for size in sizes:
        (output, gradients), (wanted, wanted_gradients) = step(tuned, size), step(expected, size)
        assert relative(output.logits, wanted.logits) < tolerance
        assert relative(output.loss, wanted.loss) < tolerance
        for name, gradient in gradients.items():
            assert relative(gradient, wanted_gradients[name]) < tolerance
    assert tuned.execution_report().execution == "shared", tuned.execution_report()


@pytest.fixture
def unchecked() -> Callable[..., Any]:
    """Two equal models whose self check, which runs more graphs, is off."""

    def make_two(name: str, make: Callable[..., Any] = tuned_model, layers: int = 3, **options: Any) -> tuple[Any, Any]:
        both = []
        for _ in range(2):
            torch.manual_seed(0)
            tuned = make(name, **options)
            tuned.runner.check = False
            if layers < 3:  # each layer takes seconds to compile
                tuned.base_model.model.layers = tuned.base_model.model.layers[:layers]
                tuned.base_model.config.num_hidden_layers = layers
            both.append(tuned)
        return both[0], both[1]

    return make_two


def test_one_graph_for_batches_of_all_sizes(unchecked: Callable[..., Any]) -> None:
    tuned, expected = unchecked("llama", layers=2)
    compile_base(tuned, "aot_eager")
    same_steps(tuned, expected, SIZES)
    assert graphs() == 1


def test_without_a_word_on_sizes_the_second_batch_is_compiled_again_and_no_more(
    unchecked: Callable[..., Any],
) -> None:
    tuned, expected = unchecked("llama")
    compile_base(tuned, "eager", dynamic=None)
    same_steps(tuned, expected, SIZES)
    assert graphs() == 2


def test_static_sizes_are_compiled_until_the_limit(unchecked: Callable[..., Any]) -> None:
    tuned, expected = unchecked("llama", layers=1)
    compile_base(tuned, "eager", dynamic=False, fullgraph=False)
    with torch._dynamo.config.patch(recompile_limit=2):
        same_steps(tuned, expected, SIZES)
    assert graphs() < len(SIZES)


def compile_module(tuned: Any) -> Any:
    tuned.base_model.compile(backend="eager", dynamic=True, fullgraph=True)
    return tuned


def wrap_base(tuned: Any) -> Any:
    base = torch.compile(tuned.base_model, backend="eager", dynamic=True, fullgraph=True)
    wrapped = spf.SoftPromptModel(base, tuned.prompts, execution="shared", check=False)
    assert wrapped.base_model is tuned.base_model
    return wrapped


@pytest.mark.parametrize("compiled", [compile_module, wrap_base])
def test_other_ways_to_compile_the_base(unchecked: Callable[..., Any], compiled: Callable[[Any], Any]) -> None:
    tuned, expected = unchecked("llama")
    same_steps(compiled(tuned), expected, SIZES)
    assert graphs() == 1


@pytest.mark.slow
def test_inductor(unchecked: Callable[..., Any]) -> None:
    for make in (tuned_model, deep_model):
        tuned, expected = unchecked("llama", make, layers=2)
        compile_base(tuned, "inductor")
        same_steps(tuned, expected, SIZES)


@pytest.mark.slow
def test_layers_that_nothing_reads_are_not_missed(unchecked: Callable[..., Any]) -> None:
    tuned, _ = unchecked("llama", layers=1)
    compile_base(tuned, "inductor")
    ids, mask = batch()
    with torch.no_grad():
        tuned(ids, mask, labels=torch.full_like(ids, -100), prompt_ids=ROWS, return_logits=False)
    assert tuned.execution_report().execution == "shared", tuned.execution_report()


@pytest.mark.slow
def test_trainer_compiles(tmp_path: Path) -> None:
    losses = []
    for compiled in (False, True):
        torch.manual_seed(0)
        tuned = spf.SoftPromptModel(build("llama"), execution="shared")
        tuned.add_prompt("long", init=torch.randn(7, 32) * 0.5)
        rows = [{"input_ids": ids, "labels": ids} for ids in torch.randint(3, 90, (16, 9))]
        backend = {"torch_compile": True, "torch_compile_backend": "eager"} if compiled else {}
        arguments = tf.TrainingArguments(
            str(tmp_path), max_steps=4, learning_rate=0.1, report_to=[], logging_steps=1, use_cpu=True, **backend
        )
        trainer = tf.Trainer(tuned, arguments, train_dataset=rows)
        trainer.train()
        losses.append([line["loss"] for line in trainer.state.log_history if "loss" in line])
    assert len(losses[0]) == 4 and losses[1] == pytest.approx(losses[0], rel=1e-4)


@pytest.mark.slow
def test_compiling_the_whole_model_breaks_graphs_outside_of_the_base(unchecked: Callable[..., Any]) -> None:
    tuned, expected = unchecked("llama", layers=1)
    compiled = torch.compile(tuned, backend="eager", dynamic=True)
    same_steps(compiled, expected, SIZES[:1])
    before = graphs()
    same_steps(compiled, expected, SIZES[1:])
    assert graphs() <= before + 2


def test_the_self_check_runs_in_graphs_too() -> None:
    tuned = tuned_model("llama")
    compile_base(tuned, "eager")
    step(tuned)
    assert list(tuned.execution_report().checked) == ["training"]


@pytest.mark.parametrize(
    ("name", "dtype"),
    [
        ("mistral-window", torch.float32),
        ("gpt2", torch.float32),
        ("gemma3", torch.bfloat16),
        ("llama", torch.float64),  # no native kernel: backward runs the attention again
    ],
)
def test_other_models_and_dtypes(unchecked: Callable[..., Any], name: str, dtype: torch.dtype) -> None:
    tuned, expected = unchecked(name, dtype=dtype)
    compile_base(tuned, "eager")
    same_steps(tuned, expected)
    if name == "mistral-window":  # the window reached the op
        assert relative(step(tuned)[0].logits, step(unchecked("llama")[0])[0].logits) > 1e-3


def test_soft_caps_and_sinks(unchecked: Callable[..., Any]) -> None:
    def eager(name: str) -> spf.SoftPromptModel:
        if name == "gpt-oss":
            config = tf.GptOssConfig(**LLAMA, sliding_window=WINDOW, num_local_experts=4, num_experts_per_tok=2)
        else:
            config = tf.Gemma2Config(
                **LLAMA, sliding_window=WINDOW, attn_logit_softcapping=2.0, query_pre_attn_scalar=8
            )
        config._experts_implementation = "eager"
        model = tf.AutoModelForCausalLM.from_config(config, attn_implementation="eager").eval()
        for parameter in model.parameters():
            torch.nn.init.normal_(parameter.data, 0, 0.25)
        tuned = spf.SoftPromptModel(model)
        for prompt, length in {"short": 2, "long": 7}.items():
            tuned.add_prompt(prompt, init=torch.randn(length, 32))
        return tuned

    for name in ("gemma2", "gpt-oss"):
        tuned, expected = unchecked(name, eager)
        layers = tuned.base_model.model.layers
        for layer in layers:  # experts are not what is tested
            layer.self_attn.compile(backend="eager", dynamic=True, fullgraph=True)
        same_steps(tuned, expected)


def test_deep_prompts_get_their_gradients(unchecked: Callable[..., Any]) -> None:
    tuned, expected = unchecked("llama", deep_model, layers=2)
    compile_base(tuned, "aot_eager")
    same_steps(tuned, expected, SIZES)
    assert graphs() == 1


@pytest.mark.slow
def test_prompts_are_compiled_and_generate(unchecked: Callable[..., Any]) -> None:
    tuned, expected = unchecked("llama")
    tuned.base_model.compile(backend="eager", dynamic=True)
    ids, mask = batch(padding="left")
    options: dict[str, Any] = {"prompt_ids": ROWS, "max_new_tokens": 4, "do_sample": False}
    assert torch.equal(tuned.generate(ids, mask, **options), expected.generate(ids, mask, **options))
    logits, wanted = (x.next_token_logits(ids, mask, ROWS) for x in (tuned, expected))
    assert relative(logits, wanted) < 1e-5


def test_the_attention_runs_again_in_a_backward_graph(unchecked: Callable[..., Any]) -> None:
    tuned, expected = unchecked("llama", layers=1, dtype=torch.float64)
    compile_base(tuned, "aot_eager")
    same_steps(tuned, expected)


@pytest.mark.parametrize("make", [tuned_model, deep_model])
def test_the_path_of_a_gpu(unchecked: Callable[..., Any], make: Callable[..., Any]) -> None:
    tuned, expected = unchecked("mistral-window", make)
    compile_base(tuned, "eager")
    with path_of_a_gpu() as calls:
        same_steps(tuned, expected, SIZES[:1])
        first = len(calls)
        same_steps(tuned, expected, SIZES)
    assert first == 9  # three layers: two forward passes, and one more before the compiled backward
    assert graphs() == 1


def test_a_library_can_be_tried_with_gradients_inside_of_the_op(
    unchecked: Callable[..., Any], monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned, expected = unchecked("llama")
    with path_of_a_gpu(), monkeypatch.context() as patched:
        wanted = step(expected)[0].logits
        tried = []

        def libraries(*_: torch.Tensor) -> list[str]:
            with torch.inference_mode(False), torch.enable_grad():
                x = torch.ones(2, requires_grad=True)
                tried.append(torch.autograd.grad((x * x).sum(), x)[0].tolist())
            return [NAME]

        patched.setattr(varlen, "libraries", libraries)
        compile_base(tuned, "eager")
        ids, mask = batch(*SIZES[0])
        with torch.no_grad():
            tuned(ids, mask, prompt_ids=ROWS)
        assert tried and all(gradient == [2.0, 2.0] for gradient in tried)
        assert relative(step(tuned)[0].logits, wanted) < 1e-5


def test_an_adapter_inside_of_the_base() -> None:
    peft = pytest.importorskip("peft")
    settings = peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    torch.manual_seed(0)
    base = peft.get_peft_model(build("llama"), settings)
    prompt = torch.randn(7, 32) * 0.5
    outputs = []
    for _ in range(2):
        tuned = spf.SoftPromptModel(base, execution="shared", check=False)
        tuned.add_prompt("long", init=prompt)
        torch.manual_seed(0)
        outputs.append(tuned(*batch(), prompt_ids="long").logits)
        base.get_base_model().compile(backend="eager", dynamic=True, fullgraph=True)
    assert relative(outputs[1], outputs[0]) < 1e-5
    assert graphs() == 1


def test_autocast(unchecked: Callable[..., Any]) -> None:
    tuned, expected = unchecked("llama", layers=1)
    compile_base(tuned, "aot_eager")
    with torch.autocast("cpu", torch.bfloat16):
        same_steps(tuned, expected, tolerance=2e-2)


@pytest.mark.parametrize("reentrant", [False, True])
def test_gradient_checkpointing(unchecked: Callable[..., Any], reentrant: bool) -> None:
    tuned, expected = unchecked("llama", layers=2)
    tuned.train()
    tuned.gradient_checkpointing_enable({"use_reentrant": reentrant})
    compile_base(tuned, "aot_eager", fullgraph=not reentrant)
    torch.manual_seed(1)
    ids, mask = batch()
    loss = tuned(ids, mask, labels=ids, prompt_ids=ROWS).loss
    tuned(*batch(rows=3, tokens=5), prompt_ids="short")  # a batch in between must not disturb a recomputation
    loss.backward()
    expected.train()
    expected(ids, mask, labels=ids, prompt_ids=ROWS).loss.backward()
    assert relative(tuned.prompts["long"].grad, expected.prompts["long"].grad) < 1e-5
    assert tuned.execution_report().execution == "shared"


def test_two_batches_before_their_backward_and_nothing_is_kept(unchecked: Callable[..., Any]) -> None:
    tuned, _ = unchecked("llama", layers=1)
    compile_base(tuned, "aot_eager")
    one, two = (step(tuned, size)[1]["long"] for size in SIZES[:2])
    gc.collect()
    gc.disable()
    try:
        before = len(traced_attention._layouts)
        losses = []
        for size in SIZES[:2]:
            torch.manual_seed(sum(size))
            ids, mask = batch(*size)
            losses.append(tuned(ids, mask, labels=ids, prompt_ids=ROWS).loss)
        (together,) = torch.autograd.grad(sum(losses), [tuned.prompts["long"]])
        assert relative(together, one + two) < 1e-5
        del losses
        assert len(traced_attention._layouts) == before
    finally:
        gc.enable()


def test_dropout_of_attention_runs_outside_of_the_graph(unchecked: Callable[..., Any]) -> None:
    tuned, _ = unchecked("llama", layers=1)
    tuned.train()
    for layer in tuned.base_model.model.layers:
        layer.self_attn.attention_dropout = 0.5
    compile_base(tuned, "eager", fullgraph=False)
    first, second = (step(tuned)[0].logits for _ in range(2))
    assert torch.equal(first, second)  # the same seed, so the same numbers are dropped
    tuned.eval()
    assert relative(step(tuned)[0].logits, first) > 1e-3
    assert tuned.execution_report().execution == "shared"


def test_a_layer_without_attention_is_found_by_counting(unchecked: Callable[..., Any]) -> None:
    tuned, _ = unchecked("llama")
    attention = tuned.base_model.model.layers[1].self_attn
    attention.forward = lambda hidden_states, **_: (hidden_states, None)
    compile_base(tuned, "eager")
    ids, mask = batch()
    tuned(ids, mask, prompt_ids=ROWS)
    assert tuned.execution_report().reason == "2 attention calls in 3 layers"


def test_an_unknown_keyword_is_never_guessed(unchecked: Callable[..., Any]) -> None:
    tuned, _ = unchecked("llama")
    attention = tuned.base_model.model.layers[0].self_attn
    original = attention.forward
    attention.forward = lambda *args, **kwargs: original(*args, novelty=1.0, **kwargs)
    compile_base(tuned, "eager", fullgraph=False)
    tuned(*batch(), prompt_ids=ROWS)
    assert "novelty" in tuned.execution_report().reason


def test_a_call_of_the_base_without_prompts_is_another_graph(unchecked: Callable[..., Any]) -> None:
    tuned, expected = unchecked("llama")
    compile_base(tuned, "eager")
    for _ in range(2):
        same_steps(tuned, expected, SIZES[:1])
        ids, mask = batch(padding="right")
        logits, wanted = (x.base_model(input_ids=ids, attention_mask=mask).logits for x in (tuned, expected))
        assert relative(logits, wanted) < 1e-5


def test_a_layout_that_is_gone_is_an_error() -> None:
    selection = tuned_model("llama").prompts.select("long", 1)
    embedding = torch.nn.Embedding(96, 32)
    layout = pack_rows(selection, embedding, torch.ones(1, 4, dtype=torch.int64), None, None, fold=False).layout
    states = [torch.randn(layout.slots, 4, 8) for _ in range(3)]
    arguments = (0, None, None, None, None, 0, None)
    handle = traced_attention.layout_handle(layout)
    out, _ = traced_attention._attention(*states, handle, *arguments)
    assert out.shape == (layout.slots, 4, 8) and layout.calls == 1
    copy, gone = handle.clone(), weakref.ref(layout)
    del handle, layout
    assert gone() is None
    with pytest.raises(Unsupported, match="after the batch was gone"):
        traced_attention._attention(*states, copy, *arguments)


def test_the_op_keeps_the_rules_of_pytorch() -> None:
    selection = tuned_model("llama").prompts.select("long", 2)
    embedding = torch.nn.Embedding(96, 32)
    layout = pack_rows(selection, embedding, torch.ones(2, 4, dtype=torch.int64), None, None, fold=False).layout
    handle = traced_attention.layout_handle(layout)
    for dtype in (torch.float32, torch.float64):
        states = [torch.randn(layout.slots, heads, 8, dtype=dtype, requires_grad=True) for heads in (4, 2, 2)]
        arguments = (*states, handle, 0, None, None, None, None, 0, None)
        torch.library.opcheck(traced_attention._attention, arguments)
