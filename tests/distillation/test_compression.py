"""A compressed text: what is trained, saved, measured and served."""

from __future__ import annotations

import json
import logging
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from support.tiny_models import build
from support.tiny_reviews import tiny_tokenizer
from support.tiny_text import TEMPLATE, TEXT, chat_tokenizer, compressed, logits_after_text, queries

import softprompt_fast as spf
from softprompt_fast.base.precision import float32_precision
from softprompt_fast.compiled.compile import slot_shape
from softprompt_fast.distillation import retention, training
from softprompt_fast.distillation.figure import retention_figure
from softprompt_fast.distillation.result import Compression, recommend
from softprompt_fast.distillation.retention import Retention
from softprompt_fast.distillation.teacher import Teacher
from softprompt_fast.inference.pipeline import SoftPromptPipeline
from softprompt_fast.inference.prompt_bank import PromptBank
from softprompt_fast.prompts.peft_files import peft_type
from softprompt_fast.tasks.encoding import encode_text, token_ids
from softprompt_fast.tasks.examples import split_rows
from softprompt_fast.tasks.task import Task

FORMS = ["embeddings", "kv"]


def model_with(form: str, model: Any, folder: Path) -> spf.SoftPromptModel:
    kind = spf.DeepPromptModel if form == "kv" else spf.SoftPromptModel
    return kind.from_pretrained(model, folder)


@pytest.fixture(scope="module")
def base() -> Any:
    return build("llama")


@pytest.fixture(scope="module")
def results(base: Any, tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Compression, Path]]:
    """A compression in each form, and its folder."""
    found = {}
    for form in FORMS:
        output = tmp_path_factory.mktemp(form)
        options: dict[str, Any] = {"form": form, "steps": 40, "learning_rate": 0.1, "name": "mine"}
        found[form] = (compressed(output, model=base, base_name="some/model", **options), output)
    return found


@pytest.mark.parametrize("form", FORMS)
def test_training_brings_the_prompt_closer_to_the_text(form: str, results: Any) -> None:
    result, _ = results[form]
    (prompt,) = result.prompts
    whole, nothing, cut, pooled = result.references
    assert (whole.kl, whole.agreement, whole.first_token) == (0, 1, 1)
    assert prompt.retention.kl < 0.9 * min(nothing.kl, cut.kl, pooled.kl)
    assert prompt.loss < 0.8 * min(prompt.init_losses.values())
    assert result.recommended is prompt and result.training_queries == 19 and result.held_out_queries == 5


@pytest.mark.parametrize("form", FORMS)
def test_retention_is_that_of_the_saved_prompt_against_the_plain_model(form: str, results: Any, base: Any) -> None:
    (result, output), tokenizer = results[form], tiny_tokenizer()
    task = Task.load(output / "mine")
    tuned = model_with(form, base, output / "mine")
    text = token_ids(tokenizer, TEXT)
    kl, same, first = [], [], []
    for row in split_rows(queries(), 0.2, 0)[1]:
        query = encode_text(task, row, tokenizer)
        assert query == token_ids(tokenizer, TEMPLATE.format(**row))
        whole = torch.tensor([text + query])
        answer = base.generate(whole, max_new_tokens=5, do_sample=False, pad_token_id=0)[0, whole.shape[1] :].tolist()
        teacher = logits_after_text(base, text, query, answer).log_softmax(-1)
        places = torch.tensor([[0, len(query) - 1 + i] for i in range(len(answer))])
        student = tuned.logits_at(torch.tensor([query + answer]), None, "mine", places).log_softmax(-1)
        kl += (teacher.exp() * (teacher - student)).sum(-1).tolist()
        agrees = (teacher.argmax(-1) == student.argmax(-1)).tolist()
        same += agrees
        first.append(agrees[0])
    measured = result.prompts[0].retention
    assert measured.kl == pytest.approx(sum(kl) / len(kl), rel=1e-3)
    assert measured.agreement == pytest.approx(sum(same) / len(same))
    assert measured.first_token == pytest.approx(sum(first) / len(first))


@pytest.mark.parametrize("form", FORMS)
def test_the_folder_is_served_like_any_other(form: str, results: Any, base: Any) -> None:
    (result, output), tokenizer = results[form], tiny_tokenizer()
    bank = PromptBank(base)
    assert bank.add_directory(output / "mine") == ["mine"]
    assert result.prompts[0].folder == output / "mine" and result.prompts[0].cache_bytes == 4 * bank.bytes_per_token
    task = bank.task("mine")
    assert task is not None and task.kind == "generation" and task.model == "some/model" and task.template == TEMPLATE
    pipe = SoftPromptPipeline(bank, tokenizer)
    answered = pipe.generate([row["text"] for row in queries(3)], "mine", max_new_tokens=4)
    tuned = model_with(form, base, output / "mine")
    for row, answer in zip(queries(3), answered, strict=True):
        ids = torch.tensor([token_ids(tokenizer, TEMPLATE.format(**row))])
        new = tuned.generate(ids, prompt_ids="mine", max_new_tokens=4, do_sample=False, pad_token_id=0)
        assert answer["text"] == tokenizer.decode(new[0, ids.shape[1] :], skip_special_tokens=True)


@pytest.mark.parametrize("form", FORMS)
def test_the_report_is_written(form: str, results: Any) -> None:
    result, output = results[form]
    report = json.loads((output / "retention.json").read_text())
    assert report["recommended"]["folder"] == str(output / "mine")
    assert report["references"][0]["label"] == "whole text" and report["text_tokens"] == 36
    assert report["settings"]["form"] == form
    assert result.notes == [
        "The text has 36 tokens. Below 300, a server with a prefix cache answers about as fast with the whole text."
    ]
    spent = result.teacher_seconds + result.prompts[0].training_seconds
    saved = result.text_first_token_seconds - result.prompts[0].first_token_seconds
    requests = result.prompts[0].break_even_requests
    assert (requests is None) == (saved <= 0) and (requests is None or 0 <= requests * saved - spent <= saved)


def test_an_old_prompt_is_the_start_for_an_edited_text(results: Any, tmp_path: Path) -> None:
    old = results["embeddings"][1] / "mine"
    options: dict[str, Any] = {"text": TEXT.replace("great plot", "lovely plot", 1), "steps": 1, "learning_rate": 1e-9}
    warm = compressed(tmp_path / "warm", init=old, **options).prompts[0]
    cold = compressed(tmp_path / "cold", **options).prompts[0]
    assert warm.init == str(old) and warm.loss < cold.loss


def test_several_sizes_share_the_teacher(tmp_path: Path) -> None:
    result = compressed(tmp_path, tokens=[4, 2, 8], max_drop=1.0)
    assert [prompt.tokens for prompt in result.prompts] == [2, 4, 8]
    assert [prompt.folder.name for prompt in result.prompts] == ["prompt-2", "prompt-4", "prompt-8"]
    assert result.recommended is result.prompts[0]
    assert [one.label for one in result.references].count("text cut") == 3
    bank = PromptBank(build("llama"))
    bank.add_directory(tmp_path)
    assert [len(bank[f"prompt-{n}"]) for n in (2, 4, 8)] == [2, 4, 8]
    figure = retention_figure(result)
    agreement, kl = figure.axes
    lines = {line.get_label(): line for line in kl.get_lines()}
    assert list(lines["trained"].get_xdata()) == [2, 4, 8]
    assert list(lines["trained"].get_ydata()) == [prompt.retention.kl for prompt in result.prompts]
    assert list(lines["text cut"].get_ydata()) == [one.kl for one in result.references[2:5]]
    assert [line.get_label() for line in agreement.get_lines()] == list(lines)
    alone = compressed(tmp_path / "alone", tokens=4, cache=tmp_path / "cache")
    assert alone.prompts[0].retention.kl == pytest.approx(result.prompts[1].retention.kl, rel=1e-5)


def test_the_recommended_size_is_the_smallest_close_to_the_best(results: Any) -> None:
    (prompt,) = results["kv"][0].prompts
    sizes = [
        replace(prompt, tokens=n, retention=Retention("", n, agreement, kl=0.0, first_token=0.0))
        for n, agreement in ((4, 0.90), (8, 0.96), (16, 0.95), (32, 0.97))
    ]
    assert recommend(sizes, 0.0).tokens == 32
    assert recommend(sizes, 0.01).tokens == 8
    assert recommend(sizes, 0.07).tokens == 4


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("init", ["text", "sampled", "pooled"])
def test_initial_values_come_from_the_text(form: str, init: str, tmp_path: Path) -> None:
    model, tokenizer = build("llama"), tiny_tokenizer()
    compressed(tmp_path, model=model, form=form, init=init, steps=1, learning_rate=1e-9)
    found = model_with(form, model, tmp_path / "prompt").prompts["prompt"]
    ids = torch.tensor(token_ids(tokenizer, TEXT))
    places = [0, 12, 23, 35] if init == "sampled" else [0, 1, 2, 3]
    assert len(ids) == 36
    vectors = model.get_input_embeddings()(ids)
    if init == "pooled":
        vectors = torch.stack([vectors[i : i + 9].mean(0) for i in range(0, 36, 9)])
    if form == "kv":
        positions = torch.arange(len(vectors)) - (32 if init == "sampled" else 0)  # rows begin at 4, not at 36
        cache = model(inputs_embeds=vectors[None], position_ids=positions[None], use_cache=True).past_key_values
        layers = [torch.stack([layer.keys[0], layer.values[0]]) for layer in cache.layers]  # [2, H', T, E]
        vectors = torch.stack(layers).permute(3, 0, 1, 2, 4).flatten(1)
        assert vectors.shape[1] == torch.Size(slot_shape(model)).numel()
    torch.testing.assert_close(found, vectors[places], atol=1e-5, rtol=1e-4)


def test_auto_takes_the_initial_values_with_the_lowest_loss(tmp_path: Path) -> None:
    (prompt,) = compressed(tmp_path, steps=1, learning_rate=1e-9).prompts
    assert set(prompt.init_losses) == {"text", "sampled", "pooled"}
    assert prompt.init == min(prompt.init_losses, key=lambda kind: prompt.init_losses[kind])
    same = compressed(tmp_path / "same", steps=1, learning_rate=1e-9, init=prompt.init).prompts[0]
    assert same.init_losses == {} and same.retention.kl == pytest.approx(prompt.retention.kl, abs=1e-6)


@pytest.mark.parametrize("form", FORMS)
def test_the_first_position_can_be_kept(form: str, tmp_path: Path) -> None:
    model = build("llama")
    options: dict[str, Any] = {"model": model, "form": form, "init": "text", "keep_first": True}
    compressed(tmp_path / "start", steps=1, **options | {"learning_rate": 1e-9})
    compressed(tmp_path / "end", steps=8, **options)
    start, end = (model_with(form, model, tmp_path / name / "prompt").prompts["prompt"] for name in ("start", "end"))
    assert torch.equal(start[0], end[0])
    assert ((start[1:] - end[1:]).abs().amax(1) > 0.01).all()
    assert peft_type(tmp_path / "end" / "prompt") == ("CARTRIDGE" if form == "kv" else "PROMPT_TUNING")


def test_a_prompt_that_retains_nothing_is_reported(tmp_path: Path) -> None:
    result = compressed(tmp_path, steps=1, learning_rate=100.0)
    assert any("retains nothing" in note for note in result.notes)


def test_the_same_seed_gives_the_same_prompt(tmp_path: Path) -> None:
    first, again, other = (
        compressed(tmp_path / str(i), seed=seed).prompts[0].retention.kl for i, seed in enumerate((0, 0, 1))
    )
    assert first == again != other


def test_products_are_rounded_only_while_the_prompt_is_trained(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: dict[str, set[str]] = {"training": set(), "measuring": set()}

    def noted(where: str, function: Any) -> Any:
        def wrapped(*args: Any, **options: Any) -> Any:
            seen[where].add(float32_precision(torch.device("cpu")))
            return function(*args, **options)

        return wrapped

    monkeypatch.setattr(training, "batch_loss", noted("training", training.batch_loss))
    monkeypatch.setattr(retention, "logits_of", noted("measuring", retention.logits_of))
    compressed(tmp_path, matmul_precision="medium", steps=2)
    assert seen == {"training": {"bf16"}, "measuring": {"ieee"}}


@pytest.mark.parametrize("divergence", ["reverse", "mixed"])
def test_the_student_can_be_corrected_on_its_own_continuations(
    divergence: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    judged = Teacher.judged
    drawn: list[list[int]] = []

    def watched(self: Any, *arguments: Any) -> Any:
        targets = judged(self, *arguments)
        drawn.append([token for target in targets for token in target.continuation])
        return targets

    monkeypatch.setattr(Teacher, "judged", watched)
    result = compressed(tmp_path, divergence=divergence, steps=16)
    assert result.prompts[0].retention.kl < 0.9 * result.references[1].kl
    assert len(drawn) == 16 and drawn[0] != drawn[-1]


def test_a_model_that_cannot_run_packed_is_compressed_too(tmp_path: Path) -> None:
    result = compressed(tmp_path, model=build("gptj"), steps=30)
    assert result.prompts[0].retention.kl < result.references[1].kl


def test_the_model_is_left_as_it_was(tmp_path: Path) -> None:
    model = build("llama").train()
    compressed(tmp_path, model=model, steps=2)
    assert all(module.training for module in model.modules())
    assert all(parameter.requires_grad and parameter.grad is None for parameter in model.parameters())


def test_a_system_prompt_is_read_in_the_chat_template(tmp_path: Path) -> None:
    model, tokenizer = build("llama"), chat_tokenizer()
    result = compressed(tmp_path, model=model, tokenizer=tokenizer, chat=True, template=None)
    task = Task.load(tmp_path / "prompt")
    assert task.template == " </s> user_turn {text} </s> assistant_turn"
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": "film dull"}]
    whole = token_ids(tokenizer, tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True))
    query = encode_text(task, {"text": "film dull"}, tokenizer)
    assert whole[-len(query) :] == query and len(whole) - len(query) == result.text_tokens
    nothing = result.references[1]
    assert nothing.tokens == 1  # "system_turn" is there without a text too


def test_tables_and_numbers_of_other_libraries_are_taken(tmp_path: Path) -> None:
    table = pd.DataFrame(queries())
    result = compressed(tmp_path, queries=table, tokens=np.int64(4), held_out=np.float32(0.25), steps=1)
    assert (result.prompts[0].tokens, result.held_out_queries) == (4, 6)


def test_a_held_out_query_is_not_trained_on_in_another_spelling(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rows = queries(6)
    with caplog.at_level(logging.WARNING):
        result = compressed(
            tmp_path, queries=rows, held_out=[{"text": f"{rows[0]['text']} "}, {"text": "dull"}], steps=1
        )
    assert result.training_queries == 5 and "1 queries have the tokens of held-out ones" in caplog.text
