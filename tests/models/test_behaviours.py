"""What users of PEFT's models rely on, done with ours. The table in docs/peft.md lists these behaviours."""

from __future__ import annotations

import copy
import gc
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support.deep_rows_alone import deep_model
from support.peft_models import FULL, IDS, LEFT, RIGHT
from support.rows_alone import tuned_model
from support.tiny_models import build
from torch import Tensor

import softprompt_fast as spf

ROWS = ["long", "short", "long", "short"]
LABELS = IDS.masked_fill(RIGHT == 0, -100)
MAKERS: dict[str, Callable[[], Any]] = {"plain": lambda: tuned_model("llama"), "deep": lambda: deep_model("llama")}
PARAMETERS = ["prompts.prompt_short", "prompts.prompt_long"]


def logits(tuned: Any, prompt_ids: Any = ROWS) -> Tensor:
    with torch.no_grad():
        value: Tensor = tuned(IDS, RIGHT, prompt_ids=prompt_ids).logits
    return value


def tokens(model: Any, *args: Any, **options: Any) -> Tensor:
    result: Tensor = model.generate(*args, **{"max_new_tokens": 5, "do_sample": False} | options)
    return result


def same(a: Any, b: Any, tolerance: float = 1e-5) -> None:
    torch.testing.assert_close(logits(a), logits(b), rtol=tolerance, atol=tolerance)


def close_in_half_precision(tuned: Any, expected: Tensor) -> None:
    got = logits(tuned)
    assert got.dtype == torch.bfloat16
    assert (got.float() - expected).norm() < 3e-2 * expected.norm()


def differs(a: Any, b: Any) -> None:
    assert not torch.allclose(logits(a), logits(b), atol=1e-3)


def save_and_load(tuned: Any, folder: Path) -> None:
    tuned.save_pretrained(folder)
    for name in ("short", "long"):
        files = {path.name for path in (folder / name).iterdir()}
        assert files == {"adapter_config.json", "adapter_model.safetensors"}
    loaded = type(tuned).from_pretrained(build("llama"), folder)
    same(tuned, loaded)
    loaded.save_pretrained(folder / "again")
    for path in folder.glob("*/adapter_*"):
        assert path.read_bytes() == (folder / "again" / path.relative_to(folder)).read_bytes()


def peft_loads_it(tuned: Any, folder: Path) -> None:
    peft = pytest.importorskip("peft")
    tuned.save_pretrained(folder)
    model = peft.PeftModel.from_pretrained(build("llama"), folder / "long")
    model.load_adapter(folder / "short", "short")
    for name in ("default", "short"):
        model.set_adapter(name)
        with torch.no_grad():
            expected = model(input_ids=IDS, attention_mask=FULL).logits[:, -IDS.shape[1] :]
            got = tuned(IDS, FULL, prompt_ids="long" if name == "default" else name).logits
        torch.testing.assert_close(got, expected, rtol=1e-4, atol=1e-4)


def load_a_prompt_under_another_name(tuned: Any, folder: Path) -> None:
    tuned.save_pretrained(folder, ["long"])
    assert not (folder / "short").exists()
    tuned.load_prompt(folder / "long", "again")
    assert list(tuned.prompts) == ["short", "long", "again"]
    assert torch.equal(logits(tuned, "again"), logits(tuned, "long"))


def state_dict(tuned: Any, folder: Path) -> None:
    expected = {name: value.clone() for name, value in tuned.state_dict().items()}
    assert list(expected) == PARAMETERS
    before = logits(tuned)
    with torch.no_grad():
        for parameter in tuned.prompts.parameters():
            parameter.zero_()
    assert not torch.allclose(logits(tuned), before, atol=1e-3)
    result = tuned.load_state_dict(expected)
    assert not result.missing_keys and not result.unexpected_keys
    assert torch.equal(logits(tuned), before)


def copies(tuned: Any, folder: Path) -> None:
    for other in (copy.deepcopy(tuned), pickle.loads(pickle.dumps(tuned))):
        assert type(other) is type(tuned)
        same(tuned, other)
        with torch.no_grad():
            other.prompts["long"].mul_(0.3)
        differs(tuned, other)
        other(IDS, RIGHT, labels=LABELS, prompt_ids=ROWS).loss.backward()
        assert tuned.prompts["long"].grad is None
        assert torch.equal(tokens(other, IDS, prompt_ids="short"), tokens(tuned, IDS, prompt_ids="short"))


def whole_model_files(tuned: Any, folder: Path) -> None:
    torch.save(tuned, folder / "model.pt")
    same(tuned, torch.load(folder / "model.pt", weights_only=False))


def without_a_prompt(tuned: Any, folder: Path) -> None:
    with torch.no_grad():
        expected = tuned.base_model(input_ids=IDS, attention_mask=RIGHT).logits * RIGHT[..., None]
    for none in ([None] * 4, [-1] * 4, torch.full((4,), -1)):
        torch.testing.assert_close(logits(tuned, none), expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(tokens(tuned, IDS, prompt_ids=none), tokens(tuned.base_model, IDS))
    mixed = logits(tuned, ["long", None, "short", None])
    torch.testing.assert_close(mixed[[1, 3]], expected[[1, 3]], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(mixed[0], logits(tuned)[0], rtol=1e-5, atol=1e-5)


def remove_a_prompt(tuned: Any, folder: Path) -> None:
    long, parameter = logits(tuned, "long"), tuned.prompts["long"]
    tuned.remove_prompt("short")
    assert list(tuned.prompts) == ["long"] and list(tuned.state_dict()) == PARAMETERS[1:]
    assert tuned.prompts["long"] is parameter  # the optimiser's
    torch.testing.assert_close(logits(tuned, None), long)  # the only prompt needs no name
    with pytest.raises(KeyError, match="'short'"):
        logits(tuned)


def several_prompts(tuned: Any, folder: Path) -> None:
    mixed = logits(tuned)
    for name in ("short", "long"):
        rows = [row for row, own in enumerate(ROWS) if own == name]
        torch.testing.assert_close(mixed[rows], logits(tuned, name)[rows], rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(logits(tuned, [1, 0, 1, 0]), mixed)
    tuned.add_prompt("copy", init="long")
    torch.testing.assert_close(logits(tuned, ["copy", "short", "copy", "short"]), mixed)
    tuned.prompts.freeze_prompt("long")
    tuned(IDS, RIGHT, labels=LABELS, prompt_ids=ROWS).loss.backward()
    assert tuned.prompts["long"].grad is None and tuned.prompts["short"].grad.norm() > 0


def half_precision(tuned: Any, folder: Path) -> None:
    before = logits(tuned)
    tuned.bfloat16()
    assert {parameter.dtype for parameter in tuned.parameters()} == {torch.bfloat16}
    assert tuned.dtype == torch.bfloat16
    close_in_half_precision(tuned, before)


def half_precision_of_the_base(tuned: Any, folder: Path) -> None:
    before = logits(tuned)
    tuned.base_model.bfloat16()
    close_in_half_precision(tuned, before)
    tuned(IDS, RIGHT, labels=LABELS, prompt_ids=ROWS).loss.backward()
    assert {parameter.grad.dtype for parameter in tuned.prompts.parameters()} == {torch.float32}
    assert tokens(tuned, IDS, prompt_ids=ROWS).shape == (4, 14)


def autocast(tuned: Any, folder: Path) -> None:
    before = logits(tuned)
    with torch.autocast("cpu", torch.bfloat16):
        close_in_half_precision(tuned, before)
        tuned(IDS, RIGHT, labels=LABELS, prompt_ids=ROWS).loss.backward()
    assert all(parameter.grad.norm() > 0 for parameter in tuned.prompts.parameters())


def generate_with_positional_arguments(tuned: Any, folder: Path) -> None:
    expected = tokens(tuned, input_ids=IDS, attention_mask=FULL, prompt_ids="long")
    assert torch.equal(tokens(tuned, IDS, FULL, "long"), expected)
    assert torch.equal(tokens(tuned, inputs=IDS, prompt_ids="long"), expected)
    configuration = tf.GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=2)
    by_configuration = tuned.generate(IDS, prompt_ids="long", generation_config=configuration)
    assert torch.equal(by_configuration, expected)
    with pytest.raises(TypeError, match="`attention_mask` must be a tensor"):
        tuned.generate(IDS, configuration, prompt_ids="long")


def generate_with_beams(tuned: Any, folder: Path) -> None:
    beams = tokens(tuned, IDS, prompt_ids=ROWS, num_beams=3)
    for row in range(4):
        alone = tokens(tuned, IDS[row : row + 1], prompt_ids=ROWS[row], num_beams=3)[0]
        assert torch.equal(beams[row][: len(alone)], alone)


def generate_padded_rows(tuned: Any, folder: Path) -> None:
    ids = IDS.masked_fill(LEFT == 0, 0)
    padded = tokens(tuned, ids, LEFT, ROWS)
    for row in range(4):
        real = LEFT[row] != 0
        alone = tokens(tuned, ids[row : row + 1, real], prompt_ids=ROWS[row])[0]
        assert torch.equal(padded[row, IDS.shape[1] :][: len(alone) - int(real.sum())], alone[int(real.sum()) :])


def what_cannot_be_given(tuned: Any, folder: Path) -> None:
    vectors = tuned.get_input_embeddings()(IDS)
    with pytest.raises(ValueError, match=r"`inputs_embeds` cannot be"):
        tokens(tuned, IDS, prompt_ids=ROWS, inputs_embeds=vectors)
    with pytest.raises(ValueError, match="`past_key_values` cannot be given"):
        tuned(IDS, prompt_ids=ROWS, past_key_values=tf.DynamicCache())
    torch.testing.assert_close(
        tuned(inputs_embeds=vectors, attention_mask=RIGHT, prompt_ids=ROWS).logits, logits(tuned)
    )


def compiled_model(tuned: Any, folder: Path) -> None:
    expected = logits(tuned)
    compiled = torch.compile(tuned, backend="eager")
    torch.testing.assert_close(logits(compiled), expected, rtol=1e-5, atol=1e-5)
    compiled(IDS, RIGHT, labels=LABELS, prompt_ids=ROWS).loss.backward()
    assert tuned.prompts["long"].grad.norm() > 0
    torch.compiler.reset()


def compiled_base(tuned: Any, folder: Path) -> None:
    other = type(tuned)(torch.compile(build("llama"), backend="eager"), tuned.prompts)
    same(tuned, other)
    torch.compiler.reset()


def gradient_checkpointing(tuned: Any, folder: Path) -> None:
    def gradients() -> list[Tensor]:
        tuned.zero_grad()
        tuned(IDS, RIGHT, labels=LABELS, prompt_ids=ROWS).loss.backward()
        return [parameter.grad.clone() for parameter in tuned.prompts.parameters()]

    tuned.train()
    expected = gradients()
    tuned.gradient_checkpointing_enable()
    assert tuned.is_gradient_checkpointing
    torch.testing.assert_close(gradients(), expected, rtol=1e-4, atol=1e-6)
    tuned.gradient_checkpointing_disable()


def facts(tuned: Any, folder: Path) -> None:
    trained = sum(parameter.numel() for parameter in tuned.prompts.parameters())
    assert tuned.num_parameters(only_trainable=True) == trained
    assert tuned.num_parameters() == trained + tuned.base_model.num_parameters()
    assert [name for name, parameter in tuned.named_parameters() if parameter.requires_grad] == PARAMETERS
    assert repr(tuned).startswith(f"{type(tuned).__name__}(\n  (base_model): LlamaForCausalLM(")
    assert tuned.config is tuned.base_model.config
    assert tuned.get_base_model() is tuned.base_model
    assert tuned.can_generate()
    logits(tuned)
    assert tuned.execution_report().execution == "shared"


def training_mode(tuned: Any, folder: Path) -> None:
    tuned.train()
    assert tuned.base_model.training and tuned.prompts.training
    tuned.eval()
    assert not tuned.base_model.training and not tuned.prompts.training


def base_model_by_itself(tuned: Any, folder: Path) -> None:
    with torch.no_grad():
        expected = build("llama")(input_ids=IDS, attention_mask=RIGHT).logits
        logits(tuned)
        assert torch.equal(tuned.base_model(input_ids=IDS, attention_mask=RIGHT).logits, expected)
    base = tuned.unload()
    gc.collect()
    assert all(parameter.requires_grad for parameter in base.parameters())
    assert base.config._attn_implementation == build("llama").config._attn_implementation
    with pytest.raises(RuntimeError, match="was unloaded"):
        logits(tuned)


BEHAVIOURS: list[Callable[[Any, Path], None]] = [
    save_and_load,
    peft_loads_it,
    load_a_prompt_under_another_name,
    state_dict,
    copies,
    whole_model_files,
    without_a_prompt,
    remove_a_prompt,
    several_prompts,
    half_precision,
    half_precision_of_the_base,
    autocast,
    generate_with_positional_arguments,
    generate_with_beams,
    generate_padded_rows,
    what_cannot_be_given,
    compiled_model,
    compiled_base,
    gradient_checkpointing,
    facts,
    training_mode,
    base_model_by_itself,
]


@pytest.mark.parametrize("kind", MAKERS)
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda function: function.__name__)
def test_behaviour(behaviour: Callable[[Any, Path], None], kind: str, tmp_path: Path) -> None:
    torch.manual_seed(3)
    behaviour(MAKERS[kind]().eval(), tmp_path)


def test_kinds_are_the_public_classes() -> None:
    assert {type(make()) for make in MAKERS.values()} == {spf.SoftPromptModel, spf.DeepPromptModel}
