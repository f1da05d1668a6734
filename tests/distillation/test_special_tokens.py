"""Text and query are read as they are written, special tokens included."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from support.tiny_models import build
from support.tiny_text import CHAT_TEMPLATE, TEXT, chat_tokenizer, compressed
from tokenizers.processors import TemplateProcessing

from softprompt_fast.cli.data import TaskOptions
from softprompt_fast.distillation.preparation import task_of
from softprompt_fast.distillation.queries import encoded
from softprompt_fast.distillation.settings import DistillationSettings
from softprompt_fast.distillation.source_text import read_source
from softprompt_fast.inference.pipeline import SoftPromptPipeline
from softprompt_fast.inference.prompt_bank import PromptBank
from softprompt_fast.tasks.encoding import encode_text, plain_text_ids, token_ids
from softprompt_fast.tasks.task import TASK_FILE, Task

TURN = "<s> user_turn {text} </s> <s> assistant_turn </s>"


def adds_special_tokens(*, end: bool = False) -> Any:
    tokenizer = chat_tokenizer()
    single = "<s> $A </s>" if end else "<s> $A"
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
        single=single, special_tokens=[("<s>", 1), ("</s>", 2)]
    )
    return tokenizer


def read(tokenizer: Any, text: str, template: str, query: str, *, chat: bool = False) -> list[int]:
    """What the teacher reads."""
    source = read_source(tokenizer, text, template, chat=chat)
    task = task_of(build("llama"), source.template, DistillationSettings(), None)
    return source.ids + encode_text(task, {"text": query}, tokenizer)


@pytest.mark.parametrize("tokenizer", [chat_tokenizer(), adds_special_tokens(), adds_special_tokens(end=True)])
def test_turns_that_the_template_writes_stay(tokenizer: Any) -> None:
    bos = tokenizer("film").input_ids[:-1][:1] if len(tokenizer("film").input_ids) > 1 else []
    written = f"system_turn {TEXT} </s> {TURN.format(text='film great')}"
    assert read(tokenizer, f"system_turn {TEXT} </s> ", TURN, "film great") == bos + token_ids(tokenizer, written)


@pytest.mark.parametrize("tokenizer", [chat_tokenizer(), adds_special_tokens()])
@pytest.mark.parametrize(
    "template",
    [
        CHAT_TEMPLATE,
        "{% for m in messages %}{{ bos_token }} {{ m['content'] }} {{ eos_token }}{% endfor %} assistant_turn",
        "{% for m in messages %}{{ m['content'] }}{{ bos_token }} {% endfor %} assistant_turn",
        "{{ messages[0]['content'] }} user_turn {{ messages[1]['content'] }} {{ eos_token }}",
    ],
)
def test_a_chat_is_read_as_transformers_reads_it(tokenizer: Any, template: str) -> None:
    tokenizer.chat_template = template
    messages = [{"role": "system", "content": TEXT}, {"role": "user", "content": "film great"}]
    expected = tokenizer.apply_chat_template(messages, add_generation_prompt=True, return_dict=False)
    assert read(tokenizer, TEXT, "{text}", "film great", chat=True) == list(expected)


def test_serving_reads_what_was_trained(tmp_path: Path) -> None:
    tokenizer, model = chat_tokenizer(), build("llama")
    compressed(tmp_path, tokenizer=tokenizer, model=model, template=TURN, steps=1)
    task = Task.load(tmp_path / "prompt")
    assert json.loads((tmp_path / "prompt" / TASK_FILE).read_text())["literal"] is True
    bank = PromptBank(model)
    bank.add("prompt", tmp_path / "prompt")
    pipe = SoftPromptPipeline(bank, tokenizer)
    written = token_ids(tokenizer, TURN.format(text="film great"))
    assert encode_text(task, {"text": "film great"}, tokenizer) == written
    assert pipe.encoder.ids("film great", "prompt") == written


def test_other_tasks_have_no_such_field(tmp_path: Path) -> None:
    Task("generation", "{text}", "response").save(tmp_path)
    assert "literal" not in json.loads((tmp_path / TASK_FILE).read_text()) and not Task.load(tmp_path).literal


@pytest.mark.parametrize("text", ["film great", "film great </s>", "<s> film </s> great", "</s>"])
def test_only_the_end_token_that_the_tokenizer_appends_is_left_out(text: str) -> None:
    alone = token_ids(chat_tokenizer(), text)
    assert plain_text_ids(chat_tokenizer(), text, end=False) == alone
    bos = [] if text.startswith("<s>") else [1]
    assert plain_text_ids(adds_special_tokens(), text, end=False) == bos + alone
    assert plain_text_ids(adds_special_tokens(end=True), text, end=False) == bos + alone


def test_a_query_without_tokens_is_named() -> None:
    task = task_of(build("llama"), "{text}", DistillationSettings(), None)

    def silent(text: str, **_: Any) -> Any:
        return SimpleNamespace(input_ids=[])

    with pytest.raises(ValueError, match="row 0: the text has no tokens"):
        encoded(task, [{"text": "film"}], silent)


@pytest.mark.parametrize("tokenizer", [chat_tokenizer(), adds_special_tokens(), adds_special_tokens(end=True)])
def test_a_prompt_for_conversations_follows_what_the_chat_template_writes(tokenizer: Any) -> None:
    tokenizer.chat_template = "{{ bos_token }} " + CHAT_TEMPLATE
    messages = [{"role": "user", "content": "film great"}, {"role": "assistant", "content": "yes"}]
    task = TaskOptions(kind="generation").task([{"messages": messages}])
    task.read_chat(tokenizer)
    expected = tokenizer.apply_chat_template(messages[:1], add_generation_prompt=True, return_dict=False)
    assert encode_text(task, {"messages": messages}, tokenizer) == list(expected) and expected[0] == 1
    assert not task.prompt_holds_bos
