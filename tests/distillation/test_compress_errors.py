"""Bad input of a compression: one clear line each, before the teacher runs."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.tiny_models import build
from support.tiny_text import TEXT, compressed, queries

import softprompt_fast as spf
from softprompt_fast.distillation.teacher import Teacher


@pytest.fixture(autouse=True)
def nothing_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    def run(self: Teacher, *arguments: Any, **options: Any) -> None:
        raise AssertionError("the teacher ran")

    monkeypatch.setattr(Teacher, "targets", run)
    monkeypatch.setattr(Teacher, "generate", run)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"text": ""}, "the text must hold words, got ''"),
        ({"text": " \n"}, "the text must hold words"),
        ({"text": "film \ud800"}, "the text must be valid Unicode, got half of a surrogate pair"),
        ({"tokens": 0}, "`tokens` must be integers of at least 1, got 0"),
        ({"tokens": [4, -1]}, "`tokens` must be integers of at least 1, got -1"),
        ({"tokens": []}, "`tokens` must name at least one number, got none"),
        ({"tokens": 2.5}, "`tokens` must be integers of at least 1, got 2.5"),
        ({"tokens": True}, "`tokens` must be integers of at least 1, got True"),
        (
            {"tokens": 1, "keep_first": True},
            r"`tokens` must be integers of at least 2 because the first position is not trained \(`keep_first`\), got",
        ),
        ({"tokens": 36}, "`tokens` must be below the text's 36 tokens, got 36"),
        ({"tokens": [2, 64]}, "`tokens` must be below the text's 36 tokens, got 64"),
        ({"init": "fitted"}, "`init` fitted needs `form` kv, got embeddings"),
        ({"keep_first": True, "init": "pooled"}, "`keep_first` cannot be combined with `init` pooled"),
        (
            {"text": TEXT * 4},
            r"the text must fit into the model's context of 128 tokens with the longest query \(9\) and its "
            r"continuation \(5\), got 144 tokens, 30 too many",
        ),
        ({"queries": None}, "there are no queries: give `queries`"),
        ({"queries": []}, "there are no queries: give `queries`"),
        ({"self_queries": -1}, "`self_queries` must be an integer from 0, got -1"),
        ({"queries": [{"text": ""}, {"text": None}]}, r"the queries must hold text, got none among 2: no text \(rows"),
        ({"queries": [{"other": "film"}]}, "the template names column 'text', but the data has"),
        ({"queries": queries(1)}, "`held_out` must be a share below 1 or a whole number .* of 1 queries on both sides"),
        ({"self_queries": 1.5}, "`self_queries` must be an integer from 0, got 1.5"),
        ({"held_out": float("nan")}, "`held_out` must be a share below 1 or a whole number .*, got nan"),
        ({"held_out": [{"other": "film"}], "self_queries": 3}, "the template names column 'text', but the data has"),
        ({"held_out": 1.7}, "`held_out` must be a share below 1 or a whole number .*, got 1.7"),
        ({"held_out": 24, "self_queries": 0}, "`held_out` must be a share below 1 or a whole number .*, got 24"),
        ({"template": ""}, "`template` must name at least one column in braces, got ''"),
        ({"template": "{a} {b}", "queries": None, "self_queries": 3}, "need a template with one column, got a, b"),
        ({"name": "a" * 127, "tokens": [2, 4]}, "`name` must be 1 to 128 letters"),
        ({"max_grad_norm": float("inf")}, "`max_grad_norm` must be positive and finite, got inf"),
        ({"max_drop": float("inf")}, "`max_drop` must be 0 or more and finite, got inf"),
        ({"seed": 2**32}, r"`seed` must be an integer from 0 to 2\*\*32 - 1, got 4294967296"),
        ({"template": "no column"}, "`template` must name at least one column in braces, got 'no column'"),
        ({"chat": True}, "conversations need a model whose tokenizer has a chat template"),
        ({"name": "a b"}, "`name` must be 1 to 128 letters"),
        ({"form": "lora"}, "`form` must be one of embeddings, kv, got 'lora'"),
        (
            {"init": "random"},
            "`init` must be .*, fitted or the folder or file of a prompt, got 'random'",
        ),
        ({"steps": 0}, "`steps` must be a positive integer, got 0"),
        ({"max_drop": -0.1}, "`max_drop` must be 0 or more and finite, got -0.1"),
    ],
)
def test_one_line_says_what_is_wrong(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises((ValueError, FileNotFoundError), match=message) as caught:
        compressed(tmp_path / "out", **options)
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "out").exists()


def test_a_text_that_leaves_no_room_for_self_made_queries(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"got 108 tokens, 49 too many"):
        compressed(tmp_path, text=TEXT * 3, queries=None, self_queries=5)


@pytest.mark.parametrize(("name", "head"), [("bert", None), ("t5", None), ("llama", "SequenceClassification")])
def test_a_model_that_cannot_continue_a_text_is_no_teacher(name: str, head: str | None, tmp_path: Path) -> None:
    model = build(name, head)
    with pytest.raises(TypeError, match=f"{type(model).__name__} cannot continue queries, so it cannot be a teacher"):
        compressed(tmp_path, model=model, queries=None, self_queries=5)


def test_a_model_without_packed_layout_has_no_keys_and_values(tmp_path: Path) -> None:
    with pytest.raises(TypeError, match="cannot run deep prompts: its class ignores"):
        compressed(tmp_path, model=build("gptj"), form="kv")


def test_a_folder_is_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "retention.json").touch()  # of an earlier run with other names
    with pytest.raises(FileExistsError, match=r"retention\.json already exists; choose another output folder"):
        compressed(tmp_path, tokens=[4, 8])
    (tmp_path / "retention.json").unlink()
    (tmp_path / "prompt-8").mkdir()
    with pytest.raises(FileExistsError, match="prompt-8 already exists; choose another output folder"):
        compressed(tmp_path, tokens=[4, 8])


def test_queries_that_are_there_are_not_overwritten(tmp_path: Path) -> None:
    (tmp_path / "queries.jsonl").write_text('{"text": "mine"}\n')
    with pytest.raises(FileExistsError, match=r"queries\.jsonl already exists; choose another output folder"):
        compressed(tmp_path, self_queries=3)
    assert (tmp_path / "queries.jsonl").read_text() == '{"text": "mine"}\n'


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"queries": ["film great", "dull"]}, "`queries` must hold a mapping of columns in each row, got str in row 0"),
        ({"queries": "queries.jsonl"}, "`queries` must be a list of rows, got one str"),
        ({"held_out": "0.2"}, "`held_out` must be a list of rows, got one str"),
        ({"held_out": ["film"]}, "`held_out` must hold a mapping of columns"),
    ],
)
def test_rows_must_be_mappings(options: dict[str, Any], message: str, tmp_path: Path) -> None:
    with pytest.raises(TypeError, match=message):
        compressed(tmp_path / "out", **options)


@pytest.mark.parametrize("argument", ["output", "cache"])
def test_folders_are_checked_before_the_teacher_runs(argument: str, tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    for place in (tmp_path / "file", tmp_path / "file" / "below"):
        folders = {"output": tmp_path / "out", "cache": tmp_path / "cache"} | {argument: place}
        with pytest.raises(OSError, match=f"`{argument}` must be a folder that can be written to, got .*file"):
            compressed(folders["output"], cache=folders["cache"])


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"tokens": 3}, "`init` must have as many positions as `tokens`, 3, got 4"),
        ({"tokens": [3, 4]}, "`init` must be auto, text, sampled, pooled, fitted for several `tokens`, got"),
        ({"model": build("bloom")}, "hidden size|tuned on|base model"),
    ],
)
def test_an_old_prompt_of_another_shape_is_refused(other: dict[str, Any], message: str, tmp_path: Path) -> None:
    tuned = spf.SoftPromptModel(build("llama"))
    tuned.add_prompt("old", 4)
    tuned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match=message):
        compressed(tmp_path / "new", init=tmp_path / "old", **{"tokens": 4} | other)


def test_keys_and_values_are_no_start_for_embeddings(tmp_path: Path) -> None:
    tuned = spf.DeepPromptModel(build("llama"))
    tuned.add_prompt("old", 4)
    tuned.save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="old"):
        compressed(tmp_path / "new", init=tmp_path / "old")
