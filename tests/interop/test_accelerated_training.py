"""A PEFT script trains the same prompt with ``accelerate``; where PEFT depends on padding, each row gets its own."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch
from support.peft_models import IDS, LENGTHS, RIGHT, VIRTUAL, base_model, batch, counted, losses, peft_model, row

import softprompt_fast as spf

pytest.importorskip("peft")
STEPS = 20
CURVES = [
    # PEFT is right: rows of one length for all; padding on the right but for heads that read the last position.
    ("llama", "CausalLM", "PromptTuning", "right"),
    ("gpt2", "CausalLM", "PromptTuning", "right"),
    ("bloom", "CausalLM", "PromptTuning", "right"),
    ("llama", "CausalLM", "PromptEncoder", "right"),
    ("llama", "CausalLM", "PrefixTuning", "right"),
    ("llama", "CausalLM", "Cartridge", "right"),
    ("llama", "SequenceClassification", "PromptTuning", "full"),
    ("gpt2", "SequenceClassification", "PromptTuning", "full"),
    ("bert", "SequenceClassification", "PromptTuning", "right"),
    ("roberta", "SequenceClassification", "PromptTuning", "right"),
    ("t5", "Seq2SeqLM", "PromptTuning", "right"),
    ("bart", "Seq2SeqLM", "PromptTuning", "right"),
]


@pytest.mark.parametrize(("name", "head", "kind", "padding"), CURVES)
def test_the_loss_curve_is_pefts(name: str, head: str, kind: str, padding: str) -> None:
    inputs = batch(padding, head)
    expected = losses(peft_model(name, head, kind), inputs, STEPS)
    model = spf.accelerate(peft_model(name, head, kind))
    assert losses(model, inputs, STEPS) == pytest.approx(expected, rel=1e-4)
    assert abs(expected[0] - expected[-1]) > 0.05  # it learned something


def test_a_prompt_runs_once_and_padding_never() -> None:
    model = spf.accelerate(peft_model())
    inputs = batch("left")
    model(**inputs)  # the first batch is compared with each row run alone
    with counted(model) as widths:
        model(**inputs).loss.backward()
    assert widths == [VIRTUAL + sum(LENGTHS)]


HEADS = [
    ("llama", "CausalLM", "PromptTuning"),
    ("llama", "CausalLM", "PrefixTuning"),
    ("bloom", "CausalLM", "PromptTuning"),
    ("t5", "Seq2SeqLM", "PromptTuning"),
    ("llama", "SequenceClassification", "PromptTuning"),
    ("bert", "SequenceClassification", "PromptTuning"),
    ("llama", "TokenClassification", "PromptTuning"),
    ("bert", "TokenClassification", "PromptTuning"),
    ("llama", "QuestionAnswering", "PromptTuning"),
    ("bert", "QuestionAnswering", "PromptTuning"),
]


def numbers(output: Any) -> torch.Tensor:
    return torch.stack([output.start_logits, output.end_logits], -1) if "start_logits" in output else output.logits


@pytest.mark.parametrize("padding", ["left", "right"])
@pytest.mark.parametrize(("name", "head", "kind"), HEADS)
def test_a_row_gets_what_it_gets_alone(name: str, head: str, kind: str, padding: str) -> None:
    model = spf.accelerate(peft_model(name, head, kind)).double()
    inputs = batch(padding, head)
    shown = 0 if kind == "PrefixTuning" else VIRTUAL
    together = model(**inputs)
    loss_of_rows, weights = 0.0, 0
    for n in range(len(IDS)):
        real = inputs["attention_mask"][n] != 0
        alone = model(**row(inputs, n))
        if head in ("CausalLM", "TokenClassification", "QuestionAnswering"):
            got = numbers(together)[n, shown:][real]
            expected = numbers(alone)[0, shown:]
        else:
            got, expected = numbers(together)[n], numbers(alone)[0]
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-9)
        if head == "CausalLM" and kind == "PromptTuning":  # the column before the first token: the prompt's last vector
            first = shown + int(real.long().argmax()) - 1
            torch.testing.assert_close(together.logits[n, first], alone.logits[0, shown - 1], rtol=0, atol=1e-9)
        share = int(real.sum()) if head in ("CausalLM", "TokenClassification") else 1
        share -= kind == "PrefixTuning"
        loss_of_rows, weights = loss_of_rows + share * alone.loss.item(), weights + share
    assert together.loss.item() == pytest.approx(loss_of_rows / weights, rel=1e-6)


@pytest.mark.parametrize(("name", "head", "kind"), HEADS)
def test_a_row_alone_is_pefts(name: str, head: str, kind: str) -> None:
    inputs = {key: value for key, value in batch("full", head).items() if head == "Seq2SeqLM" or key != "labels"}
    inputs = {key: value for key, value in inputs.items() if not key.endswith("_positions")}
    plain = peft_model(name, head, kind).double()
    expected = plain(**inputs, output_hidden_states=True)
    output = spf.accelerate(plain)(**inputs, output_hidden_states=True)
    for key in {"logits", "start_logits", "end_logits", "encoder_last_hidden_state"} & expected.keys():
        assert output[key].shape == expected[key].shape
        exact = output[key][..., VIRTUAL:, :] if head == "CausalLM" and kind == "PromptTuning" else output[key]
        torch.testing.assert_close(exact, expected[key][:, -exact.shape[1] :] if exact.dim() > 2 else expected[key])
    for key in {"hidden_states", "encoder_hidden_states"} & expected.keys():
        assert [states.shape for states in output[key]] == [states.shape for states in expected[key]]


@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
def test_gradient_checkpointing_changes_nothing(kind: str) -> None:
    inputs = batch("left")
    expected = losses(spf.accelerate(peft_model(kind=kind)), inputs, 3)
    model = spf.accelerate(peft_model(kind=kind))
    model.gradient_checkpointing_enable()
    model.enable_input_require_grads()
    assert model.is_gradient_checkpointing
    assert losses(model, inputs, 3) == pytest.approx(expected, rel=1e-5)


def test_only_the_prompt_and_the_head_are_trained() -> None:
    model = peft_model("llama", "SequenceClassification")
    before = {name: p.requires_grad for name, p in model.named_parameters()}
    head = {name: p.detach().clone() for name, p in model.named_parameters() if "score" in name and p.requires_grad}
    assert head
    spf.accelerate(model)
    assert {name: p.requires_grad for name, p in model.named_parameters()} == before
    losses(model, batch("left", "SequenceClassification"), 2)
    assert all(not torch.equal(dict(model.named_parameters())[name], value) for name, value in head.items())


@pytest.mark.parametrize("options", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
@pytest.mark.parametrize("kind", ["PromptTuning", "PrefixTuning"])
def test_trainer_takes_an_accelerated_model(tmp_path: Path, kind: str, options: dict[str, Any]) -> None:
    import transformers as tf

    model = spf.accelerate(peft_model(kind=kind))
    before = [p.detach().clone() for p in model.parameters() if p.requires_grad]
    arguments = tf.TrainingArguments(
        str(tmp_path), report_to=[], use_cpu=True, disable_tqdm=True, max_steps=2, eval_strategy="steps", **options
    )
    trainer = tf.Trainer(
        model, arguments, train_dataset=[{}] * 4, eval_dataset=[{}] * 4, data_collator=lambda rows: dict(batch("right"))
    )
    trainer.train()
    after = [p for p in model.parameters() if p.requires_grad]
    assert all(not torch.equal(a, b) for a, b in zip(after, before, strict=True))
    assert (tmp_path / "checkpoint-2" / "adapter_model.safetensors").is_file()
    assert trainer.evaluate()["eval_loss"] > 0


@pytest.mark.parametrize("read_first", [False, True])
def test_logits_of_training_are_computed_when_they_are_read(read_first: bool) -> None:
    model = spf.accelerate(peft_model())
    inputs = batch("right")
    expected = spf.accelerate(peft_model().eval())(**inputs)
    output = model(**inputs)
    parameter = next(p for p in model.parameters() if p.requires_grad)
    if not read_first:  # logits stay those of the prompt of this call
        output.loss.backward()
        with torch.no_grad():
            parameter.add_(1.0)
    assert list(output) == ["loss", "logits"] == list(expected)
    torch.testing.assert_close(output["logits"], expected.logits)
    torch.testing.assert_close(output[1], expected.logits)
    torch.testing.assert_close(output.to_tuple()[1], expected.logits)
    if read_first:
        torch.testing.assert_close(output.loss, expected.loss)
        output.logits[:, VIRTUAL:].square().sum().backward()
        got, parameter.grad = parameter.grad, None
        model.eval()(**inputs).logits[:, VIRTUAL:].square().sum().backward()
        torch.testing.assert_close(got, parameter.grad)


def test_logits_that_are_first_read_without_gradients_have_them_in_the_loss() -> None:
    model = spf.accelerate(peft_model())
    parameter = next(p for p in model.parameters() if p.requires_grad)
    output = model(**batch("right"))
    with torch.no_grad():
        assert output.logits.argmax(-1) is not None
    output.logits[:, VIRTUAL:].square().sum().backward()
    assert parameter.grad is not None and parameter.grad.any()


def test_a_loop_that_reads_logits_computes_them_with_the_loss() -> None:
    model = spf.accelerate(peft_model())
    inputs = batch("right")
    assert model(**inputs).logits is not None
    with counted(model) as widths:
        assert model(**inputs)["logits"] is not None
    assert widths == [VIRTUAL + sum(LENGTHS)]


def test_logits_are_computed_at_once_where_dropout_would_differ() -> None:
    model = spf.accelerate(peft_model())
    model.config.attention_dropout = 0.5
    with counted(model) as widths:
        output = model(**batch("right"))
        calls = len(widths)
        assert output.logits is not None
    assert len(widths) == calls


@pytest.mark.parametrize("form", ["tuple", "vectors", "positional", "kept"])
def test_forms_of_a_call(form: str) -> None:
    plain = peft_model().eval()
    inputs = batch("right")
    calls = {
        "tuple": lambda m: m(**inputs, return_dict=False),
        "vectors": lambda m: m(
            inputs_embeds=m.get_input_embeddings()(IDS),
            attention_mask=RIGHT,
            labels=inputs["labels"],
            return_dict=False,
        ),
        "positional": lambda m: m(IDS, RIGHT, None, inputs["labels"]).to_tuple(),
        "kept": lambda m: (torch.zeros(()), m(IDS, RIGHT, logits_to_keep=3).logits),
    }
    loss, logits = calls[form](plain)[:2]
    got_loss, got_logits = calls[form](spf.accelerate(plain))
    torch.testing.assert_close(got_loss, loss)
    assert got_logits.shape == logits.shape
    columns = torch.cat([torch.ones(4, VIRTUAL), RIGHT], 1)[:, -logits.shape[1] :].bool()
    columns[:, : max(0, logits.shape[1] - 10)] = False
    torch.testing.assert_close(got_logits[columns], logits[columns], rtol=1e-4, atol=1e-5)


def test_parameters_that_peft_trains_elsewhere_in_the_base_are_trained() -> None:
    import peft

    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=VIRTUAL, modules_to_save=["lm_head"])
    plain, model = (peft.get_peft_model(base_model("llama"), config).train() for _ in range(2))
    model.load_state_dict(plain.state_dict())
    inputs = batch("right")
    assert losses(spf.accelerate(model), inputs, 5) == pytest.approx(losses(plain, inputs, 5), rel=1e-4)
