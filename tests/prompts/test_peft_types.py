"""All prompt types of PEFT: it writes a folder, we read it, and the logits are the same; and the other way round."""

from __future__ import annotations

import json
import re
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file
from support.peft_models import FULL, IDS, RIGHT, VIRTUAL, base_model, peft_model
from support.tiny_text import tiny_tokenizer
from torch import Tensor

import softprompt_fast as spf
from softprompt_fast.inference import PromptBank, SoftPromptPipeline
from softprompt_fast.prompts.peft_files import prompts_by_name, read_prompt
from softprompt_fast.registry.record import only_prompt

peft = pytest.importorskip("peft")

TYPES: dict[str, tuple[str, dict[str, Any]]] = {
    "PROMPT_TUNING": ("PromptTuning", {}),
    "P_TUNING": ("PromptEncoder", {"encoder_hidden_size": 16}),
    "P_TUNING of an LSTM": ("PromptEncoder", {"encoder_hidden_size": 16, "encoder_reparameterization_type": "LSTM"}),
    "CPT": (
        "CPT",
        {"cpt_token_ids": [5, 6, 7, 8, 9], "cpt_mask": [1] * 5, "cpt_tokens_type_mask": [1, 2, 3, 4, 2]},
    ),
    "PREFIX_TUNING": ("PrefixTuning", {}),
    "PREFIX_TUNING projected": ("PrefixTuning", {"prefix_projection": True, "encoder_hidden_size": 16}),
    "CARTRIDGE": ("Cartridge", {"num_frozen_tokens": 2}),
    "CARTRIDGE without a sink": ("Cartridge", {"num_frozen_tokens": 0}),
}
PLAIN = [kind for kind in TYPES if not kind.startswith(("PREFIX", "CARTRIDGE"))]
DEEP = [kind for kind in TYPES if kind not in PLAIN]


def theirs(name: str, kind: str, head: str = "CausalLM") -> Any:
    config, options = TYPES[kind]
    return peft_model(name, head, config, **options).eval()


@torch.no_grad()
def logits(model: Any, mask: Tensor, **inputs: Tensor) -> Tensor:
    """PEFT's logits of texts, without those of the prompt's columns."""
    output: Tensor = model(input_ids=IDS, attention_mask=mask, **inputs).logits
    return output[:, -IDS.shape[1] :]


def difference(a: Tensor, b: Tensor, mask: Tensor) -> float:
    real = mask.bool()
    return ((a[real] - b[real]).abs().max() / b[real].abs().max()).item()


@pytest.mark.parametrize("mask", [FULL, RIGHT], ids=["full", "right"])
@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", TYPES)
def test_we_read_what_peft_writes(kind: str, name: str, mask: Tensor, tmp_path: Path) -> None:
    model = theirs(name, kind)
    expected = logits(model, mask)
    model.save_pretrained(tmp_path / "saved")
    own_class = spf.DeepPromptModel if kind in DEEP else spf.SoftPromptModel
    tuned = own_class.from_pretrained(base_model(name), tmp_path)
    assert tuned.prompts.lengths == {"saved": VIRTUAL}
    tuned.add_prompt("copy", init=str(tmp_path / "saved"))
    with torch.no_grad():
        for prompt in ("saved", "copy"):
            assert difference(tuned(IDS, mask, prompt_ids=prompt).logits, expected, mask) < 1e-5
        assert difference(logits(model, mask), logits(model.base_model, mask), mask) > 1e-2  # the prompt matters
    bank = PromptBank(base_model(name))
    assert bank.add_directory(tmp_path) == ["saved"]
    assert torch.equal(bank["saved"].cpu(), tuned.prompts["saved"])


@pytest.mark.parametrize("kind", ["P_TUNING", "CPT", "CARTRIDGE"])
def test_a_pipeline_scores_with_a_folder_of_peft(kind: str, tmp_path: Path) -> None:
    model = theirs("llama", kind)
    model.save_pretrained(tmp_path / "saved")
    bank = PromptBank(base_model("llama"))
    bank.add_directory(tmp_path)
    pipe = SoftPromptPipeline(bank, tiny_tokenizer())
    (result,) = pipe.score(["a film"], [" yes no"], "saved")
    text, target = pipe.encoder.ids("a film", "saved"), pipe.encoder.target("a film", "saved", " yes no")
    ids = torch.tensor([[*text, *target]])
    with torch.no_grad():
        output = model(input_ids=ids, attention_mask=torch.ones_like(ids)).logits[0, -len(target) - 1 : -1]
    expected = output.log_softmax(-1).gather(1, torch.tensor(target)[:, None]).sum().item()
    assert result["log_probability"] == pytest.approx(expected, abs=1e-4)


@pytest.mark.parametrize("name", ["llama", "gpt2"])
@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING", "PREFIX_TUNING", "CARTRIDGE"])
def test_peft_reads_what_we_write(kind: str, name: str, tmp_path: Path, recwarn: pytest.WarningsRecorder) -> None:
    deep = kind in DEEP
    tuned = (spf.DeepPromptModel if deep else spf.SoftPromptModel)(base_model(name))
    torch.manual_seed(5)
    values = torch.randn(VIRTUAL, tuned.prompts.embedding_dim) * 0.4
    tuned.add_prompt("ours", init=values, **({"num_frozen_tokens": 2} if kind == "CARTRIDGE" else {}))
    tuned.save_pretrained(tmp_path, peft_type=kind)
    model = peft.PeftModel.from_pretrained(base_model(name), tmp_path / "ours").eval()
    assert model.active_peft_config.peft_type == kind
    with torch.no_grad():
        assert difference(tuned(IDS, RIGHT, prompt_ids="ours").logits, logits(model, RIGHT), RIGHT) < 1e-5
    assert not [str(one.message) for one in recwarn if "nexpected" in str(one.message)]


@pytest.mark.parametrize(("kind", "config"), [("P_TUNING", "PromptEncoder"), ("CARTRIDGE", "Cartridge")])
def test_our_configuration_has_the_fields_of_peft(kind: str, config: str, tmp_path: Path) -> None:
    theirs("llama", kind).save_pretrained(tmp_path / "theirs")
    tuned = (spf.DeepPromptModel if kind in DEEP else spf.SoftPromptModel)(base_model("llama"))
    tuned.add_prompt("ours", init=torch.zeros(VIRTUAL, tuned.prompts.embedding_dim))
    tuned.save_pretrained(tmp_path, peft_type=kind)
    ours, others = (json.loads((tmp_path / one / "adapter_config.json").read_text()) for one in ("ours", "theirs"))
    assert set(ours) - {"peft_version"} <= set(others)
    same = ["peft_type", "num_layers", "num_attention_heads", "token_dim", "num_transformer_submodules"]
    if kind == "P_TUNING":
        same = ["peft_type", "token_dim", "encoder_reparameterization_type", "encoder_num_layers", "encoder_dropout"]
    assert [ours[field] for field in same] == [others[field] for field in same]


def test_other_types_are_not_written(tmp_path: Path) -> None:
    plain, deep = spf.SoftPromptModel(base_model("llama")), spf.DeepPromptModel(base_model("llama"))
    with pytest.raises(ValueError, match="`peft_type` must be PROMPT_TUNING or P_TUNING, got 'CPT'"):
        plain.save_pretrained(tmp_path, peft_type="CPT")
    with pytest.raises(ValueError, match="`peft_type` must be PREFIX_TUNING or CARTRIDGE, got 'P_TUNING'"):
        deep.save_pretrained(tmp_path, peft_type="P_TUNING")
    plain.add_prompt("updated", 3)
    plain.prompts.add_token_update("updated", 4, 2)
    with pytest.raises(ValueError, match="`peft_type` P_TUNING cannot be written for a prompt with a token update"):
        plain.save_pretrained(tmp_path, peft_type="P_TUNING")


# --- several tasks in one folder ---


def multitask(tmp_path: Path, tasks: int = 3, name: str = "llama", head: str = "CausalLM", **options: Any) -> Any:
    model = peft_model(name, head, "MultitaskPromptTuning", num_tasks=tasks, num_ranks=2, **options).eval()
    with torch.no_grad():  # products near 1, so that every prompt matters
        for parameter in (model.prompt_encoder.default.prefix_task_cols, model.prompt_encoder.default.prefix_task_rows):
            parameter.add_(1)
    model.save_pretrained(tmp_path / "many")
    return model


@pytest.mark.parametrize("mask", [FULL, RIGHT], ids=["full", "right"])
def test_each_task_of_a_folder_is_a_prompt(mask: Tensor, tmp_path: Path) -> None:
    model = multitask(tmp_path)
    tuned = spf.SoftPromptModel.from_pretrained(base_model("llama"), tmp_path)
    assert tuned.prompts.names == ["many-0", "many-1", "many-2"]
    rows = [2, 0, 1, 2]
    expected = logits(model, mask, task_ids=torch.tensor(rows))
    with torch.no_grad():
        got = tuned(IDS, mask, prompt_ids=[f"many-{row}" for row in rows]).logits
    assert difference(got, expected, mask) < 1e-5
    assert not torch.allclose(tuned.prompts["many-0"], tuned.prompts["many-1"], atol=0.1)


def test_a_task_is_named_by_its_number(tmp_path: Path) -> None:
    multitask(tmp_path)
    folder = tmp_path / "many"
    tuned = spf.SoftPromptModel(base_model("llama"))
    one = tuned.load_prompt(f"{folder}#1")
    assert tuned.prompts.names == ["many-1"]
    assert torch.equal(tuned.add_prompt("copy", init=f"{folder}#1"), one)
    assert torch.equal(read_prompt(f"{folder}#1")[0], one)
    only = spf.SoftPromptModel.from_pretrained(base_model("llama"), folder, names=["many-1"])
    assert only.prompts.names == ["many-1"] and torch.equal(only.prompts["many-1"], one)
    bank = PromptBank(base_model("llama"))
    bank.add("second", f"{folder}#1")
    assert bank.add_directory(folder) == ["many-0", "many-1", "many-2"]
    assert torch.equal(bank["second"], one) and torch.equal(bank["many-1"], one)
    deep = spf.DeepPromptModel(base_model("llama"))
    deep.add_prompt("from", init=f"{folder}#1")
    with torch.no_grad():
        assert torch.allclose(deep(IDS, prompt_ids="from").logits, tuned(IDS, prompt_ids="copy").logits, atol=1e-4)


def test_without_a_number_the_tasks_are_listed(tmp_path: Path) -> None:
    multitask(tmp_path)
    folder = tmp_path / "many"
    tuned = spf.SoftPromptModel(base_model("llama"))
    for read in (tuned.load_prompt, lambda path: tuned.add_prompt("new", init=path)):
        with pytest.raises(
            ValueError, match=r"holds the prompts of 3 tasks, .*many#0 to .*many#2; one of them must be"
        ):
            read(folder)
    with pytest.raises(ValueError, match=r"many#3 must be a task of the folder, which holds 3 tasks"):
        tuned.load_prompt(f"{folder}#3")
    tuned.add_prompt("plain", 2)
    tuned.save_pretrained(tmp_path, ["plain"])
    with pytest.raises(ValueError, match=r"plain#0 names a task, but .*plain holds one prompt, of type PROMPT_TUNING"):
        tuned.load_prompt(tmp_path / "plain#0")


def test_one_task_needs_no_number(tmp_path: Path) -> None:
    model = multitask(tmp_path, tasks=1)
    tuned = spf.SoftPromptModel.from_pretrained(base_model("llama"), tmp_path)
    assert tuned.prompts.names == ["many"]
    with torch.no_grad():
        got = tuned(IDS, prompt_ids="many").logits
    assert difference(got, logits(model, FULL, task_ids=torch.zeros(4, dtype=torch.int64)), FULL) < 1e-5


def test_a_folder_whose_name_looks_like_a_task_is_a_folder(tmp_path: Path) -> None:
    tuned = spf.SoftPromptModel(base_model("llama"))
    tuned.add_prompt("plain", 2)
    tuned.save_pretrained(tmp_path)
    (tmp_path / "plain").rename(tmp_path / "run#2")
    assert list(prompts_by_name(tmp_path)) == ["run-2"]
    assert torch.equal(tuned.load_prompt(tmp_path / "run#2"), tuned.prompts["plain"])


def test_tensors_of_tasks_must_fit_each_other(tmp_path: Path) -> None:
    multitask(tmp_path)
    file = tmp_path / "many" / "adapter_model.safetensors"
    for key, shape in (("prefix_task_rows", [2, 2, 32]), ("prefix_task_cols", [3, 4, 2]), ("prompt_embeddings", [5])):
        tensors = load_file(file)
        save_file(tensors | {key: torch.zeros(shape)}, file)
        with pytest.raises(ValueError, match=rf"must have shapes \[P, D\], .*, got .*{re.escape(str(shape))}"):
            spf.SoftPromptModel.from_pretrained(base_model("llama"), tmp_path)
        save_file(tensors, file)


def test_a_task_is_no_version(tmp_path: Path) -> None:
    multitask(tmp_path)
    assert only_prompt(multitask_of_one(tmp_path)).name == "one"
    with pytest.raises(ValueError, match=r"a version must be one prompt, got .* with many-0, many-1, many-2"):
        only_prompt(tmp_path / "many")
    with pytest.raises(ValueError, match=r"a version must be a folder, got a task of one, .*many#1"):
        only_prompt(tmp_path / "many#1")


def multitask_of_one(tmp_path: Path) -> Path:
    multitask(tmp_path / "other", tasks=1)
    return (tmp_path / "other" / "many").rename(tmp_path / "other" / "one")


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("num_tasks", 10**9, "`num_tasks` must be 1 to 10000, got 1000000000"),
        ("num_tasks", "3", "`num_tasks` must be a number from 0, got '3'"),
        ("num_virtual_tokens", 4, r"num_virtual_tokens=4 rows, got \[5, 32\]"),
    ],
)
def test_a_wrong_configuration_of_tasks_is_refused(field: str, value: Any, message: str, tmp_path: Path) -> None:
    multitask(tmp_path)
    file = tmp_path / "many" / "adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {field: value}))
    with pytest.raises(ValueError, match=message):
        spf.SoftPromptModel.from_pretrained(base_model("llama"), tmp_path)


# --- encoder-decoders ---


@pytest.mark.parametrize("kind", ["PROMPT_TUNING", "P_TUNING"])
def test_prompts_of_an_encoder_decoder(kind: str, tmp_path: Path) -> None:
    model = theirs("t5", kind, "Seq2SeqLM")
    model.save_pretrained(tmp_path / "saved")
    tuned = spf.SoftPromptModel.from_pretrained(base_model("t5", "Seq2SeqLM"), tmp_path)
    assert tuned.prompts.lengths == {"saved": VIRTUAL}
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=FULL, decoder_input_ids=IDS).logits
        assert difference(tuned(IDS, decoder_input_ids=IDS).logits, expected, FULL) < 1e-5


def test_tasks_of_an_encoder_decoder(tmp_path: Path) -> None:
    model = multitask(tmp_path, name="t5", head="Seq2SeqLM", num_transformer_submodules=1)
    tuned = spf.SoftPromptModel.from_pretrained(base_model("t5", "Seq2SeqLM"), tmp_path)
    tasks = torch.tensor([2, 0, 1, 2])
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=FULL, labels=IDS, task_ids=tasks).logits
        got = tuned(IDS, labels=IDS, prompt_ids=[f"many-{task}" for task in tasks], return_logits=True).logits
    assert difference(got, expected, FULL) < 1e-5


def test_tasks_with_a_prompt_of_the_decoder_are_refused(tmp_path: Path) -> None:
    multitask(tmp_path, name="t5", head="Seq2SeqLM")
    with pytest.raises(ValueError, match="num_transformer_submodules must be 1, got 2: the second half"):
        spf.SoftPromptModel.from_pretrained(base_model("t5", "Seq2SeqLM"), tmp_path)


def test_keys_and_values_of_an_encoder_decoder_are_refused(tmp_path: Path) -> None:
    theirs("t5", "PREFIX_TUNING", "Seq2SeqLM").save_pretrained(tmp_path / "saved")
    with pytest.raises(ValueError, match="for an encoder-decoder, and deep prompts run in decoders only"):
        spf.DeepPromptModel(base_model("llama")).load_prompt(tmp_path / "saved")
    with pytest.raises(ValueError, match="is a deep prompt, which this model cannot run"):
        PromptBank(base_model("t5", "Seq2SeqLM")).add_directory(tmp_path)
    with pytest.raises(
        ValueError, match=r"`peft_type` must be PROMPT_TUNING, P_TUNING, .*, got 'PREFIX_TUNING', which DeepPromptModel"
    ):
        spf.SoftPromptModel(base_model("t5", "Seq2SeqLM")).load_prompt(tmp_path / "saved")


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification"])
def test_a_head_that_peft_saved_is_named_where_only_vectors_are_read(
    head: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model = peft_model("llama", head).eval()
    model.save_pretrained(tmp_path / "saved")
    base = base_model("llama", head)
    tuned = spf.SoftPromptModel(base)
    tuned.add_prompt("saved", init=tmp_path / "saved")
    assert "also holds ['base_model.score." in caplog.text and "belong to the model and are not loaded" in caplog.text
    tensors = load_file(tmp_path / "saved" / "adapter_model.safetensors")
    base.load_state_dict(
        {name.removeprefix("base_model."): value for name, value in tensors.items() if name.startswith("base_model.")},
        strict=False,
    )
    with torch.no_grad():
        expected = model(input_ids=IDS, attention_mask=FULL).logits
        expected = expected[:, -IDS.shape[1] :] if head == "TokenClassification" else expected
        assert torch.allclose(tuned(IDS, FULL, prompt_ids="saved").logits, expected, atol=1e-4)


def test_adapters_that_are_no_prompts_are_refused(tmp_path: Path) -> None:
    lora = peft.get_peft_model(base_model("llama"), peft.LoraConfig(task_type="CAUSAL_LM", target_modules=["q_proj"]))
    lora.save_pretrained(tmp_path / "lora")
    with pytest.raises(ValueError, match=r"`peft_type` must be PROMPT_TUNING, .*, got 'LORA'"):
        spf.SoftPromptModel.from_pretrained(base_model("llama"), tmp_path)
