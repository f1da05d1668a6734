"""What PEFT's models can do is what accelerated ones can do. The table in docs/peft.md lists these behaviours."""

from __future__ import annotations

import copy
import pickle
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers as tf
from support.peft_models import FULL, IDS, LEFT, VIRTUAL, adapter_config, base_model, batch, fill, peft_model
from torch import Tensor

import softprompt_fast as spf

peft = pytest.importorskip("peft")
INPUTS = batch("right")
Pair = tuple[Any, Any]
"""A PEFT model, and an accelerated one with the same numbers."""


def loss(model: Any) -> Tensor:
    with torch.no_grad():
        value: Tensor = model(**INPUTS).loss
    return value


def same(plain: Any, model: Any, tolerance: float = 1e-4) -> None:
    assert vars(model).get("_softprompt_fast") is not None  # this library ran it
    assert loss(model).item() == pytest.approx(loss(plain).item(), rel=tolerance)


def tokens(model: Any, *args: Any, **options: Any) -> Tensor:
    result: Tensor = model.generate(*args, **{"max_new_tokens": 5, "do_sample": False} | options)
    return result


def save_and_load(plain: Any, model: Any, folder: Path) -> None:
    for name, each in (("plain", plain), ("ours", model)):
        each.save_pretrained(folder / name)
    for file in ("adapter_config.json", "adapter_model.safetensors"):
        assert (folder / "ours" / file).read_bytes() == (folder / "plain" / file).read_bytes()
    loaded = peft.PeftModel.from_pretrained(base_model("llama"), folder / "ours")
    assert loss(loaded).item() == pytest.approx(loss(plain).item(), rel=1e-5)
    same(plain, spf.accelerate(loaded))


def save_without_safetensors(plain: Any, model: Any, folder: Path) -> None:
    model.save_pretrained(folder, safe_serialization=False)
    assert (folder / "adapter_model.bin").is_file()
    same(plain, spf.accelerate(peft.PeftModel.from_pretrained(base_model("llama"), folder)))


def state_dict(plain: Any, model: Any, folder: Path) -> None:
    expected, got = plain.state_dict(), model.state_dict()
    assert list(got) == list(expected)
    assert all(torch.equal(got[name], value) for name, value in expected.items())
    fill(model, 7).load_state_dict(expected)
    same(plain, model)


def copies(plain: Any, model: Any, folder: Path) -> None:
    for other in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
        same(plain, other)
        fill(other, 9)
        assert loss(other) != loss(model)
        spf.restore(other)
    same(plain, model)


def whole_model_files(plain: Any, model: Any, folder: Path) -> None:
    torch.save(model, folder / "model.pt")
    same(plain, torch.load(folder / "model.pt", weights_only=False))


def disable_adapter(plain: Any, model: Any, folder: Path) -> None:
    attributes = set(vars(model))
    with model.disable_adapter():
        assert loss(model).item() == pytest.approx(loss(model.base_model).item(), rel=1e-6)
        assert torch.equal(tokens(model, IDS), tokens(model.base_model, IDS))
    assert set(vars(model)) == attributes
    same(plain, model)


def several_adapters(plain: Any, model: Any, folder: Path) -> None:
    kind = type(plain.active_peft_config).__name__.removesuffix("Config")
    for each in (plain, model):
        each.add_adapter("other", adapter_config(kind=kind, num_virtual_tokens=3))
        same_numbers = torch.Generator().manual_seed(5)
        with torch.no_grad():
            for parameter in each.prompt_encoder["other"].parameters():
                parameter.normal_(0, 0.4, generator=same_numbers)
    first = loss(model)
    same(plain, model)
    for name in ("other", "default", "other"):
        plain.set_adapter(name)
        model.set_adapter(name)
        same(plain, model)
        assert torch.equal(tokens(model, IDS), tokens(plain, IDS))
    assert loss(model) != first
    with pytest.warns(UserWarning, match="was active"):
        model.delete_adapter("other")
    assert model.active_adapter == "default"
    assert loss(model) == first


def load_adapter(plain: Any, model: Any, folder: Path) -> None:
    fill(plain, 11).save_pretrained(folder)
    model.load_adapter(folder, "loaded")
    model.set_adapter("loaded")
    same(plain, model)


def half_precision(plain: Any, model: Any, folder: Path) -> None:
    same(plain.bfloat16(), model.bfloat16(), 3e-2)
    assert model(**INPUTS).logits.dtype == torch.bfloat16


def half_precision_of_the_base(plain: Any, model: Any, folder: Path) -> None:
    plain.base_model.bfloat16()
    model.base_model.bfloat16()
    same(plain, model, 3e-2)
    model(**INPUTS).loss.backward()
    assert {p.grad.dtype for p in model.parameters() if p.grad is not None} == {torch.float32}


def autocast(plain: Any, model: Any, folder: Path) -> None:
    with torch.autocast("cpu", torch.bfloat16):
        same(plain, model, 3e-2)


def generate_with_positional_arguments(plain: Any, model: Any, folder: Path) -> None:
    configuration = tf.GenerationConfig(max_new_tokens=5, do_sample=False, pad_token_id=0, eos_token_id=2)
    expected = plain.generate(IDS, configuration)
    assert torch.equal(model.generate(IDS, configuration), expected)
    assert torch.equal(model.generate(input_ids=IDS, generation_config=configuration), expected)


def generate_with_beams(plain: Any, model: Any, folder: Path) -> None:
    assert torch.equal(tokens(model, IDS, num_beams=3), tokens(plain, IDS, num_beams=3))


def generate_padded_rows(plain: Any, model: Any, folder: Path) -> None:
    ids = IDS.masked_fill(LEFT == 0, 0)
    got = tokens(model, input_ids=ids, attention_mask=LEFT)
    for n, row in enumerate(got):
        real = LEFT[n] != 0
        alone = tokens(plain, input_ids=ids[n : n + 1, real])[0]
        assert torch.equal(row[IDS.shape[1] :][: len(alone) - int(real.sum())], alone[int(real.sum()) :])
    assert torch.equal(tokens(model, ids), got)  # transformers takes a mask from padding tokens


def generate_with_what_only_peft_runs(plain: Any, model: Any, folder: Path) -> None:
    result = tokens(model, IDS, cache_implementation="dynamic", penalty_alpha=None)
    assert torch.equal(result, tokens(plain, IDS))
    vectors = model.get_input_embeddings()(IDS)
    try:
        expected = tokens(plain, inputs_embeds=vectors)
    except Exception as error:
        with pytest.raises(type(error)):
            tokens(model, inputs_embeds=vectors)
    else:
        assert torch.equal(tokens(model, inputs_embeds=vectors), expected)


def forward_with_a_cache(plain: Any, model: Any, folder: Path) -> None:
    with torch.no_grad():
        expected, got = (each(IDS, use_cache=True) for each in (plain, model))
    torch.testing.assert_close(got.logits, expected.logits)
    assert got.past_key_values.get_seq_length() == VIRTUAL + IDS.shape[1]


def compiled_model(plain: Any, model: Any, folder: Path) -> None:
    compiled = torch.compile(model, backend="eager")
    assert compiled(**INPUTS).loss.item() == pytest.approx(loss(plain).item(), rel=1e-4)


def facts(plain: Any, model: Any, folder: Path) -> None:
    assert isinstance(model, peft.PeftModelForCausalLM)
    assert repr(model) == repr(plain)
    assert model.get_nb_trainable_parameters() == plain.get_nb_trainable_parameters()
    assert torch.equal(model.get_prompt_embedding_to_save("default"), plain.get_prompt_embedding_to_save("default"))
    assert [name for name, _ in model.named_modules()] == [name for name, _ in plain.named_modules()]
    assert model.execution_report().execution == "shared"


def replica(plain: Any, model: Any, folder: Path) -> None:
    other = model._replicate_for_data_parallel()
    other.base_model = copy.deepcopy(plain.base_model)
    assert loss(other).item() == pytest.approx(loss(plain).item(), rel=1e-6)
    same(plain, model)


def base_model_by_itself(plain: Any, model: Any, folder: Path) -> None:
    assert torch.equal(loss(model.get_base_model()), loss(plain.get_base_model()))
    assert torch.equal(tokens(model.base_model, IDS), tokens(plain.base_model, IDS))


BEHAVIOURS: list[Callable[[Any, Any, Path], None]] = [
    save_and_load,
    save_without_safetensors,
    state_dict,
    copies,
    whole_model_files,
    disable_adapter,
    several_adapters,
    load_adapter,
    half_precision,
    half_precision_of_the_base,
    autocast,
    generate_with_positional_arguments,
    generate_with_beams,
    generate_padded_rows,
    generate_with_what_only_peft_runs,
    forward_with_a_cache,
    compiled_model,
    facts,
    replica,
    base_model_by_itself,
]


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
@pytest.mark.parametrize("behaviour", BEHAVIOURS, ids=lambda function: function.__name__)
def test_behaviour(behaviour: Callable[[Any, Any, Path], None], kind: str, tmp_path: Path) -> None:
    plain, model = peft_model(kind=kind).eval(), spf.accelerate(peft_model(kind=kind).eval())
    behaviour(plain, model, tmp_path)


def test_encoder_decoders_generate() -> None:
    plain = peft_model("bart", "Seq2SeqLM").eval()
    model = spf.accelerate(peft_model("bart", "Seq2SeqLM").eval())
    expected = tokens(plain, input_ids=IDS, attention_mask=FULL)
    assert torch.equal(tokens(model, input_ids=IDS, attention_mask=FULL), expected)
    with model.disable_adapter():
        assert torch.equal(tokens(model, input_ids=IDS), tokens(model.base_model, input_ids=IDS))
