"""The teacher says what the plain model says after text and query; its answers are kept on disk."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import peft
import pytest
import torch
from safetensors import safe_open
from support.tiny_models import build
from support.tiny_reviews import tiny_tokenizer
from support.tiny_text import TEMPLATE, TEXT, logits_after_text, queries

from softprompt_fast.base.errors import Unsupported
from softprompt_fast.distillation import teacher as teacher_module
from softprompt_fast.distillation.retention import Contestant, measure_retention
from softprompt_fast.distillation.settings import DistillationSettings
from softprompt_fast.distillation.teacher import CHUNK, Target, Teacher
from softprompt_fast.inference import prompt_bank
from softprompt_fast.models.soft_prompt_model import SoftPromptModel
from softprompt_fast.tasks.encoding import token_ids

TOKENIZER = tiny_tokenizer()
IDS = token_ids(TOKENIZER, TEXT)
QUERIES = [token_ids(TOKENIZER, TEMPLATE.format(**row)) for row in queries(6)]


def teacher_of(model: Any, cache: Path | None = None, **settings: Any) -> Teacher:
    return Teacher(model, TOKENIZER, IDS, DistillationSettings(**{"new_tokens": 6, "top_k": 7} | settings), cache)


def count_runs(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """Rows of each call of ``generate``."""
    calls: list[int] = []
    generate = Teacher.generate

    def counted(self: Teacher, queries: Any, *arguments: Any, **options: Any) -> Any:
        calls.append(len(queries))
        return generate(self, queries, *arguments, **options)

    monkeypatch.setattr(Teacher, "generate", counted)
    return calls


def broken(*_: Any) -> Any:
    raise Unsupported("its attention cannot be replaced")


def same(a: list[Target], b: list[Target]) -> bool:
    return all(
        x.query == y.query
        and x.continuation == y.continuation
        and torch.equal(x.top_ids, y.top_ids)
        and torch.equal(x.log_probabilities, y.log_probabilities)
        for x, y in zip(a, b, strict=True)
    )


@pytest.mark.parametrize("name", ["llama", "gemma", "gemma3", "gptj", "mistral-window", "bloom", "mpt"])
def test_the_teacher_is_the_model_that_reads_text_and_query(name: str) -> None:
    model = build(name)
    for target in teacher_of(model).targets(QUERIES):
        whole = torch.tensor([IDS + target.query])
        expected = model.generate(whole, max_new_tokens=6, do_sample=False, pad_token_id=0)[0, whole.shape[1] :]
        assert target.continuation == expected.tolist()
        logits = logits_after_text(model, IDS, target.query, target.continuation)
        values, ids = logits.log_softmax(-1).topk(7)
        torch.testing.assert_close(target.log_probabilities[:, :-1], values, atol=1e-4, rtol=1e-4)
        assert torch.equal(target.top_ids, ids)
        torch.testing.assert_close(target.log_probabilities.exp().sum(-1), torch.ones(len(ids)))


def test_the_text_runs_once() -> None:
    model = build("llama")
    teacher = teacher_of(model)
    targets = teacher.targets(QUERIES)
    read: list[int] = []
    hook = model.model.layers[0].register_forward_pre_hook(lambda _, inputs: read.append(inputs[0].shape[1]))
    teacher.logits(targets)
    hook.remove()
    assert read == [sum(len(target.query) + len(target.continuation) - 1 for target in targets)]


@pytest.mark.parametrize("name", ["llama", "bloom"])
def test_a_text_that_is_not_kept_runs_with_its_batch(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build(name)
    expected = teacher_of(model).targets(QUERIES)
    monkeypatch.setattr(prompt_bank, "compile_prompts", broken)
    found = teacher_of(model).targets(QUERIES)
    for one, other in zip(found, expected, strict=True):
        assert one.continuation == other.continuation and torch.equal(one.top_ids, other.top_ids)
        torch.testing.assert_close(one.log_probabilities, other.log_probabilities, atol=1e-4, rtol=1e-4)


def test_a_continuation_ends_with_the_end_token() -> None:
    model = build("llama")
    before = [target.continuation for target in teacher_of(model).targets(QUERIES)]
    row = max(range(len(before)), key=lambda i: len(before[i]))
    end = before[row][2]
    model.generation_config.eos_token_id = end
    targets = teacher_of(model).targets(QUERIES)
    assert targets[row].continuation == before[row][: before[row].index(end) + 1]
    assert all(end not in target.continuation[:-1] for target in targets)
    assert all(len(target.top_ids) == len(target.continuation) for target in targets)


def test_large_logits_are_computed_in_parts(monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    expected = teacher_of(model).targets(QUERIES)
    student = Contestant("nothing", 0, SoftPromptModel(model), None)
    (measured,) = measure_retention(teacher_of(model), [student], expected, DistillationSettings())
    parts: list[list[int]] = []
    logits = Teacher.logits

    def counted(self: Teacher, targets: Any) -> Any:
        parts.append([len(target.continuation) for target in targets])
        return logits(self, targets)

    monkeypatch.setattr(Teacher, "logits", counted)
    lengths = [len(target.continuation) for target in expected]
    for places in (sum(lengths) // 2, 1):  # then less than one continuation has
        monkeypatch.setattr(teacher_module, "LARGEST_LOGITS", places * model.config.vocab_size)
        found = teacher_of(model).targets(QUERIES)
        assert len(parts) > 1 and [length for part in parts for length in part] == lengths
        assert all(sum(part) <= places or len(part) == 1 for part in parts)
        for one, other in zip(found, expected, strict=True):
            assert one.continuation == other.continuation and torch.equal(one.top_ids, other.top_ids)
            torch.testing.assert_close(one.log_probabilities, other.log_probabilities)
        (again,) = measure_retention(teacher_of(model), [student], found, DistillationSettings())
        assert parts[: len(parts) // 2] == parts[len(parts) // 2 :] and again.kl == pytest.approx(measured.kl, rel=1e-4)
        assert (again.agreement, again.first_token) == (measured.agreement, measured.first_token)
        parts.clear()


def test_the_top_tokens_leave_one_for_the_rest() -> None:
    target = teacher_of(build("llama"), top_k=500).targets(QUERIES[:1])[0]
    assert target.top_ids.shape[1] == 95 and torch.isfinite(target.log_probabilities).all()


def test_sampled_continuations_follow_the_seed() -> None:
    model = build("llama")
    first, again, other = (teacher_of(model, continuation="sampled", seed=seed).targets(QUERIES) for seed in (1, 1, 2))
    assert same(first, again)
    assert [t.continuation for t in first] != [t.continuation for t in other]
    assert [t.continuation for t in first] != [t.continuation for t in teacher_of(model).targets(QUERIES)]
    logits = logits_after_text(model, IDS, first[0].query, first[0].continuation)
    expected = logits.log_softmax(-1).gather(-1, first[0].top_ids)
    torch.testing.assert_close(first[0].log_probabilities[:, :-1], expected, atol=1e-4, rtol=1e-4)


def test_sampling_leaves_the_callers_random_numbers_alone() -> None:
    teacher = teacher_of(build("llama"), continuation="sampled")
    torch.manual_seed(3)
    expected = torch.rand(1)
    torch.manual_seed(3)
    teacher.targets(QUERIES[:2])
    assert torch.equal(torch.rand(1), expected)


def test_known_answers_need_no_model(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, calls = build("llama"), count_runs(monkeypatch)
    many = (QUERIES * 8)[: CHUNK + 5]
    first = teacher_of(model, tmp_path).targets(many)
    assert calls == [CHUNK, 5] and len(list(tmp_path.iterdir())) == 2
    assert same(first, teacher_of(model, tmp_path).targets(many))
    assert calls == [CHUNK, 5]
    teacher_of(model, tmp_path).targets(many[:CHUNK] + QUERIES[:2])  # an interrupted run, or more queries
    assert calls == [CHUNK, 5, 2]
    with safe_open(next(iter(tmp_path.iterdir())), "pt") as file:
        assert json.loads(file.metadata()["facts"])["text"] == IDS


@pytest.mark.parametrize("change", [{"new_tokens": 4}, {"top_k": 3}, {"temperature": 2.0}, {"continuation": "sampled"}])
def test_other_settings_are_other_answers(tmp_path: Path, change: dict[str, Any]) -> None:
    model = build("llama")
    teacher_of(model, tmp_path).targets(QUERIES)
    fresh = teacher_of(model, **change).targets(QUERIES)
    assert same(teacher_of(model, tmp_path, **change).targets(QUERIES), fresh)
    assert len(list(tmp_path.iterdir())) == 2


def test_another_generation_configuration_gives_other_answers(tmp_path: Path) -> None:
    model = build("llama")
    teacher_of(model, tmp_path).targets(QUERIES)
    model.generation_config.suppress_tokens = list(range(10, 60))
    (first, *_) = teacher_of(model, tmp_path).targets(QUERIES)
    assert not set(first.continuation) & set(range(10, 60))


@pytest.mark.parametrize(
    "own",
    [
        {"return_dict_in_generate": True},
        {"output_attentions": True},
        {"num_beams": 3},
        {"num_return_sequences": 2, "num_beams": 2},
    ],
)
def test_the_models_own_options_give_one_answer(own: dict[str, Any]) -> None:
    model = build("llama")
    expected = teacher_of(model).targets(QUERIES)
    model.generation_config.update(**own)
    assert same(expected, teacher_of(model).targets(QUERIES))


@pytest.mark.parametrize("own", [{"min_p": 0.99}, {"epsilon_cutoff": 0.5}, {"top_p": 0.01}, {"temperature": 0.01}])
def test_a_sampled_continuation_is_drawn_from_the_whole_distribution(own: dict[str, Any]) -> None:
    model = build("llama")
    greedy = teacher_of(model).targets(QUERIES)
    model.generation_config.update(do_sample=True, **own)
    drawn = teacher_of(model, continuation="sampled").targets(QUERIES)
    assert sum(a.continuation != b.continuation for a, b in zip(greedy, drawn, strict=True)) > len(QUERIES) // 2


def test_a_damaged_file_is_written_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = build("llama")
    first = teacher_of(model, tmp_path).targets(QUERIES)
    (file,) = tmp_path.iterdir()
    file.write_bytes(file.read_bytes()[:-40])
    calls = count_runs(monkeypatch)
    assert same(first, teacher_of(model, tmp_path).targets(QUERIES)) and calls == [6]
    assert same(first, teacher_of(model, tmp_path).targets(QUERIES)) and calls == [6]


@pytest.mark.parametrize("change", ["weights", "one number", "head", "configuration", "scaling"])
def test_answers_of_another_model_are_not_used(change: str, tmp_path: Path) -> None:
    model: Any = build("llama")
    if change == "scaling":
        config = peft.LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False)
        model = peft.get_peft_model(model, config).eval()
    teacher_of(model, tmp_path).targets(QUERIES)
    with torch.no_grad():
        if change == "scaling":
            model.base_model.model.model.layers[0].self_attn.q_proj.scaling["default"] *= 40
        elif change == "weights":
            for parameter in model.parameters():
                parameter.mul_(1 + 0.01 * torch.rand(parameter.shape))
        elif change == "one number":
            model.model.layers[1].mlp.up_proj.weight[3, 4] *= 1.001
        elif change == "head":
            model.lm_head.weight[40] *= 2
        else:
            model.config.rms_norm_eps = 0.1
    teacher_of(model, tmp_path).targets(QUERIES)
    assert len(list(tmp_path.iterdir())) == 2


def test_weights_that_cannot_be_read_are_known_by_their_answers(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch: pytest.MonkeyPatch
) -> None:
    model = build("llama")
    monkeypatch.setattr(teacher_module, "weights_sha256", lambda model: None)
    teacher_of(model, tmp_path).targets(QUERIES)
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight.mul_(3)  # keeps every sign
    with caplog.at_level(logging.WARNING):
        found = teacher_of(model, tmp_path).targets(QUERIES)
    assert "other weights" in caplog.text
    assert same(found, teacher_of(model).targets(QUERIES))
    assert same(found, teacher_of(model, tmp_path).targets(QUERIES))
