"""Documents that are compressed together, and prompts that stand one after the other."""

from __future__ import annotations

import json
import logging
from pathlib import Path
from shutil import copytree
from typing import Any

import pytest
import torch
from rich.console import Console
from support.tiny_models import VOCABULARY, build
from support.tiny_reviews import WORDS, tiny_tokenizer
from support.tiny_text import TEMPLATE, TEXT, chat_tokenizer, queries

import softprompt_fast as spf
from softprompt_fast.distillation import compress_documents, join_prompts
from softprompt_fast.distillation import queries as queries_module
from softprompt_fast.distillation.arrangements import OPENING, Teachers, read_documents
from softprompt_fast.distillation.documents import TRAINED, DocumentCompression
from softprompt_fast.distillation.settings import DistillationSettings
from softprompt_fast.distillation.teacher import Teacher
from softprompt_fast.inference.pipeline import SoftPromptPipeline
from softprompt_fast.inference.prompt_bank import PromptBank
from softprompt_fast.prompts.peft_files import read_prompt, write_prompt
from softprompt_fast.tasks.encoding import token_ids
from softprompt_fast.tasks.task import Task

DOCUMENTS = {"first": TEXT, "second": "very dull plot . great film . yes " * 3, "third": "no fine film , " * 5}
FORMS = ["embeddings", "kv"]


def rows(count: int = 24) -> list[dict[str, Any]]:
    return [row | {"document": list(DOCUMENTS)[i % 3]} for i, row in enumerate(queries(count))]


def compressed(output: Path, **options: Any) -> DocumentCompression:
    given: dict[str, Any] = {
        "tokens": 4,
        "template": TEMPLATE,
        "steps": 40,
        "batch_size": 8,
        "new_tokens": 5,
        "learning_rate": 0.05,
        "cache": output / "cache",
        "console": Console(quiet=True),
    }
    model, tokenizer = options.pop("model", None) or build("llama"), options.pop("tokenizer", None) or tiny_tokenizer()
    documents, some = options.pop("documents", DOCUMENTS), options.pop("queries", rows())
    return compress_documents(model, tokenizer, documents, output, some, **given | options)


@pytest.fixture(scope="module")
def results(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[DocumentCompression, Path]]:
    found = {}
    for form in FORMS:
        output = tmp_path_factory.mktemp(form)
        found[form] = compressed(output, form=form), output
    return found


@pytest.mark.parametrize("form", FORMS)
def test_the_prompts_come_closer_to_the_documents_alone_and_together(form: str, results: Any) -> None:
    result, output = results[form]
    for retention in (result.alone, result.together):
        nothing, cut, trained = retention
        assert trained.label == TRAINED and trained.kl < 0.9 * min(nothing.kl, cut.kl)
    assert [one.tokens for one in result.alone] == [0, 4, 4] and [one.tokens for one in result.together] == [0, 8, 8]
    report = json.loads((output / "documents.json").read_text())
    assert report["together"][2]["kl"] == result.together[2].kl and set(report["prompts"]) == set(DOCUMENTS)


def test_others_beside_a_document_in_training_help_where_prompts_are_joined(tmp_path: Path, results: Any) -> None:
    apart = compressed(tmp_path, beside=0)
    assert results["embeddings"][0].together[2].kl < apart.together[2].kl


@pytest.mark.parametrize("form", FORMS)
def test_joined_prompts_are_the_prompts_one_after_the_other(form: str, results: Any, tmp_path: Path) -> None:
    _, output = results[form]
    folder = join_prompts([output / "third", output / "first"], tmp_path / "joined")
    kind = spf.DeepPromptModel if form == "kv" else spf.SoftPromptModel
    model = kind.from_pretrained(build("llama"), output)
    joined = kind.from_pretrained(build("llama"), folder)
    values = torch.cat([model.prompts["third"], model.prompts["first"]])
    assert torch.equal(joined.prompts["joined"], values)
    ids = torch.randint(3, 50, (3, 6))
    mask = torch.tensor([[1] * 6, [1] * 4 + [0] * 2, [1] * 6])
    names = [("third", "first"), "second", ("first",)]
    found = model(ids, mask, prompt_ids=names).logits
    assert torch.allclose(found[0], joined(ids[:1]).logits[0], atol=1e-5)
    for row, name in ((1, "second"), (2, "first")):
        alone = model(ids[row : row + 1], mask[row : row + 1], prompt_ids=name).logits[0]
        assert torch.allclose(found[row][mask[row].bool()], alone[mask[row].bool()], atol=1e-5)
    task = Task.load(folder)
    assert task.prompt == "joined" and task.template == TEMPLATE
    bank = PromptBank(build("llama"))
    bank.add("joined", folder)
    assert len(SoftPromptPipeline(bank, tiny_tokenizer()).generate([{"text": "film"}], max_new_tokens=3)) == 1


@pytest.mark.parametrize("execution", ["padded", "shared"])
def test_gradients_of_prompts_that_are_joined_in_a_row(execution: str) -> None:
    tuned = spf.SoftPromptModel(build("llama"), execution=execution)
    values = {name: torch.randn(length, 32) * 0.5 for name, length in (("a", 2), ("b", 3))}
    for name, init in values.items():
        tuned.add_prompt(name, init=init)
    ids, mask = torch.randint(3, 50, (3, 5)), torch.tensor([[1] * 5, [1] * 3 + [0] * 2, [1] * 5])
    rows_of: list[Any] = [("a", "b"), ("b", "a", "b"), "b"]
    tuned(ids, mask, labels=ids.masked_fill(mask == 0, -100), prompt_ids=rows_of).loss.backward()
    leaves = {name: init.clone().requires_grad_() for name, init in values.items()}
    losses = []
    for row, names in enumerate(rows_of):
        own = ids[row][mask[row].bool()][None]
        front = torch.cat([leaves[name] for name in ((names,) if isinstance(names, str) else names)])
        vectors = torch.cat([front[None], tuned.get_input_embeddings()(own)], 1)
        logits = tuned.base_model(inputs_embeds=vectors).logits[0, len(front) - 1 : -1]
        losses.append(torch.nn.functional.cross_entropy(logits, own[0], reduction="sum"))
    (torch.stack(losses).sum() / mask.sum()).backward()
    for name, leaf in leaves.items():
        assert torch.allclose(tuned.prompts[name].grad, leaf.grad, atol=1e-6)


def test_generation_after_prompts_that_are_joined_in_a_row() -> None:
    tuned = spf.SoftPromptModel(build("llama"))
    for name, length in (("a", 2), ("b", 3)):
        tuned.add_prompt(name, init=torch.randn(length, 32) * 0.5)
    tuned.add_prompt("ab", init=torch.cat([tuned.prompts["a"], tuned.prompts["b"]]).detach())
    ids = torch.randint(3, 50, (2, 5))
    options = {"max_new_tokens": 6, "do_sample": False, "pad_token_id": 0}
    found = tuned.generate(ids, None, [("a", "b"), None], **options)
    assert torch.equal(found, tuned.generate(ids, None, ["ab", None], **options))


def test_strangers_are_joined_with_a_warning(results: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    _, output = results["embeddings"]
    with caplog.at_level(logging.WARNING):
        pair = join_prompts([output / "first", output / "second"], tmp_path / "friends")
    assert "trained" not in caplog.text
    with caplog.at_level(logging.WARNING):
        join_prompts([pair, output / "third"], tmp_path / "crowd")
    assert "at most 1 others stood beside a document" in caplog.text
    compressed(tmp_path / "other", steps=1)
    with caplog.at_level(logging.WARNING):
        mixed = join_prompts([output / "first", tmp_path / "other" / "second"], tmp_path / "strangers")
    assert "first, second were not trained together" in caplog.text
    caplog.clear()
    with caplog.at_level(logging.WARNING):
        join_prompts([mixed, output / "second"], tmp_path / "again")
    assert "strangers, second were not trained together" in caplog.text


@pytest.mark.parametrize("form", FORMS)
def test_a_chats_opening_stands_once_before_all_documents(form: str, tmp_path: Path) -> None:
    tokenizer, model = chat_tokenizer(), build("llama")
    read = read_documents(tokenizer, DOCUMENTS, "{text}", chat=True)
    assert tokenizer.decode(read.opening) == "system_turn" and read.front(("a", "b")) == (OPENING, "a", "b")
    compressed(tmp_path, model=model, tokenizer=tokenizer, chat=True, template=None, steps=2, form=form)
    kind = spf.DeepPromptModel if form == "kv" else spf.SoftPromptModel
    loaded = kind.from_pretrained(model, tmp_path)
    second, first = loaded.prompts["second"], loaded.prompts["first"]
    opening = kind(model)
    opening.add_prompt("o", init=model.get_input_embeddings()(torch.tensor(read.opening)).detach())
    for prompt in (second, first):
        assert len(prompt) == 5 and torch.allclose(prompt[:1], opening.prompts["o"], atol=1e-6)
    pair = join_prompts([tmp_path / "second", tmp_path / "first"], tmp_path / "pair")
    joined = kind.from_pretrained(model, pair).prompts["pair"]
    assert torch.equal(joined, torch.cat([second, first[1:]]))
    more = join_prompts([tmp_path / "third", pair], tmp_path / "more")
    expected = torch.cat([loaded.prompts["third"], joined[1:]])
    assert torch.equal(kind.from_pretrained(model, more).prompts["more"], expected)


def test_the_same_question_about_two_documents_is_two_queries(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    same = [row | {"document": name} for row in queries(4) for name in DOCUMENTS]
    with caplog.at_level(logging.WARNING):
        result = compressed(tmp_path, queries=[*same, same[0]], held_out=same[:2], steps=1)
    assert result.training_queries == 10 and result.held_out_queries == 2
    assert "1 of 13 queries are left out: repeated" in caplog.text


def test_documents_that_fit_only_alone(tmp_path: Path) -> None:
    model = build("llama")
    model.config.max_position_embeddings = 70
    long = dict.fromkeys(("first", "second", "third"), TEXT)
    with pytest.raises(ValueError, match="the text must fit into the model's context"):
        compressed(tmp_path, model=model, documents=long)
    result = compressed(tmp_path, model=model, documents=long, beside=0, steps=1)
    assert result.together == [] and len(result.alone) == 3


def test_queries_are_made_from_each_documents_own_parts(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(queries_module, "PART", 8)
    shown: list[Any] = []
    original = Teacher.generate

    def generate(self: Teacher, asked: Any, seed: Any = None, speaker: Any = None, **options: Any) -> Any:
        if speaker is not None:
            shown.append({name: self.model.prompts[name].detach() for name in set(speaker[1])})
        return original(self, asked, seed, speaker, **options)

    monkeypatch.setattr(Teacher, "generate", generate)
    tokenizer, model = tiny_tokenizer(*(f"word{i}" for i in range(len(WORDS), VOCABULARY))), build("llama")
    compressed(tmp_path, model=model, tokenizer=tokenizer, queries=[], self_queries=2, template=None, steps=1)
    assert len(shown) == 3
    read = read_documents(tokenizer, DOCUMENTS, "{text}", chat=False)
    for parts, ids in zip(shown, read.pieces.values(), strict=True):
        whole = model.get_input_embeddings()(torch.tensor(ids))
        places = [whole[i : i + len(part)] for part in parts.values() for i in range(len(whole))]
        assert all(any(torch.equal(place, part) for place in places) for part in parts.values())


def test_teachers_share_one_model_and_read_what_a_teacher_of_the_whole_reads(tmp_path: Path) -> None:
    tokenizer, model = chat_tokenizer(), build("llama")
    read = read_documents(tokenizer, DOCUMENTS, "{text}", chat=True)
    teachers = Teachers(model, tokenizer, read, DistillationSettings(new_tokens=5), None)
    asked = [token_ids(tokenizer, "very dull"), token_ids(tokenizer, "film")]
    for arrangement in (("second", "first"), ("third",)):
        whole = Teacher(model, tokenizer, read.ids(arrangement), DistillationSettings(new_tokens=5), None)
        pairs = zip(teachers[arrangement].targets(asked), whole.targets(asked), strict=True)
        for found, expected in pairs:
            assert found.continuation == expected.continuation
            assert torch.allclose(found.log_probabilities, expected.log_probabilities, atol=1e-5)
    assert teachers[("third",)].model is teachers[("second", "first")].model


def test_self_made_queries_are_kept(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer(*(f"word{i}" for i in range(len(WORDS), VOCABULARY)))
    compressed(tmp_path, tokenizer=tokenizer, queries=[], self_queries=4, template=None, steps=1)
    made = [json.loads(line) for line in (tmp_path / "queries.jsonl").read_text().splitlines()]
    assert len(made) == 12 and {row["document"] for row in made} == set(DOCUMENTS)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"documents": {"one": TEXT}}, "`documents` must hold at least two texts, got 1"),
        ({"documents": DOCUMENTS | {"opening": TEXT}}, "must not be named 'opening'"),
        ({"documents": DOCUMENTS | {"third": " "}}, "the text must hold words"),
        ({"beside": 3}, "`beside` must be 0 to 2, the number of other documents, got 3"),
        ({"tokens": 60}, "`tokens` must be below the"),
        ({"tokens": 2.5}, "`tokens` must be integers of at least 1, got 2.5"),
        ({"tokens": 1, "keep_first": True}, "because the first position is not trained"),
        ({"free_continuations": 5}, "`free_continuations` cannot be given for several documents"),
        (
            {"queries": [row for row in rows() if row["document"] != "third"]},
            "about each document, got none about 'third'",
        ),
        ({"divergence": "reverse"}, "`divergence` must be forward for several documents, got reverse"),
        (
            {"init": "elsewhere"},
            "for several documents, got elsewhere",
        ),
        ({"beside": 1.5}, "`beside` must be 0 to 2, the number of other documents, got 1.5"),
        ({"documents": {1: TEXT, "two": TEXT}}, "`name` must be 1 to 128 letters"),
        (
            {"self_queries": 2, "queries": None, "document_column": "text"},
            "`document_column` must not be the column of self-made queries, got 'text'",
        ),
        ({"held_out": 1.5}, "`held_out` must be a share below 1 or a whole number"),
        ({"queries": queries(6)}, "column 'document' must be one of first, second, third, got None"),
        ({"queries": []}, "there are no queries"),
    ],
)
def test_bad_input(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=message):
        compressed(tmp_path, **options)
    assert not list(tmp_path.glob("*/adapter_config.json"))


def test_a_held_out_query_is_not_trained_on_in_another_spelling(tmp_path: Path) -> None:
    some = rows(12)
    held_out = [some[0] | {"text": f"{some[0]['text']} "}, some[1] | {"document": "third"}]
    result = compressed(tmp_path, queries=some, held_out=held_out, steps=1)
    assert result.training_queries == 11  # the second one is about another document


def test_a_joined_prompt_keeps_the_opening_of_a_run_after_a_prompt_without_one(
    results: Any, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    tokenizer = chat_tokenizer()
    compressed(tmp_path / "chat", tokenizer=tokenizer, chat=True, template="{text}", steps=1)
    plain, chat = results["embeddings"][1] / "first", tmp_path / "chat" / "first"
    with caplog.at_level(logging.WARNING):
        joined = read_prompt(join_prompts([plain, chat], tmp_path / "joined"))[0]
    assert "were not trained together" in caplog.text
    assert torch.equal(joined, torch.cat([read_prompt(plain)[0], read_prompt(chat)[0]]))


@pytest.mark.parametrize(("file", "text"), [("task.json", "{"), ("task.json", '{"x": 1}'), ("composition.json", "{}")])
def test_a_damaged_file_leaves_nothing_half_written(file: str, text: str, results: Any, tmp_path: Path) -> None:
    output = results["embeddings"][1]
    for name in ("first", "second"):
        copytree(output / name, tmp_path / name)
    (tmp_path / "first" / file).write_text(text)
    with pytest.raises(ValueError, match=f"{file} must hold"):
        join_prompts([tmp_path / "first", tmp_path / "second"], tmp_path / "joined")
    assert not (tmp_path / "joined").exists()


def test_bad_joins(results: Any, tmp_path: Path) -> None:
    plain, deep = results["embeddings"][1], results["kv"][1]
    with pytest.raises(ValueError, match="must have one form"):
        join_prompts([plain / "first", deep / "first"], tmp_path / "x")
    with pytest.raises(ValueError, match="must name at least one prompt"):
        join_prompts([], tmp_path / "x")
    with pytest.raises(ValueError, match="must be folders of prompts"):
        join_prompts([tmp_path], tmp_path / "x")
    with pytest.raises(FileExistsError, match="already exists"):
        join_prompts([plain / "first"], plain / "second")
    with pytest.raises(ValueError, match="must be 1 to 128 letters"):
        join_prompts([plain / "first"], tmp_path / "joined.v1")
    write_prompt(tmp_path / "wide", torch.zeros(2, 64), {})
    with pytest.raises(ValueError, match="must have prompts of one width, got 32"):
        join_prompts([plain / "first", tmp_path / "wide"], tmp_path / "x")


def test_an_unknown_name_in_a_row() -> None:
    tuned = spf.SoftPromptModel(build("llama"))
    tuned.add_prompt("a", 2)
    with pytest.raises(KeyError, match="b"):
        tuned(torch.ones(1, 2, dtype=torch.int64), prompt_ids=[("a", "b")])
