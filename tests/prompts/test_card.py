"""Model cards: what they say, that the Hub can read them, and which cards are kept."""

from __future__ import annotations

import ast
import json
import logging
import re
import shlex
from pathlib import Path
from typing import Any

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from support.tiny_models import build
from support.tiny_reviews import reviews, tiny_tokenizer
from support.tiny_text import compressed

import softprompt_fast as spf
from softprompt_fast.prompts import write_card
from softprompt_fast.prompts.card import card_text, is_ours, several_text
from softprompt_fast.prompts.card_facts import card_facts, without_folders
from softprompt_fast.prompts.card_text import card_body
from softprompt_fast.tasks import Task, classification_task, load_rows
from softprompt_fast.tuning import tune


def tuned_run(folder: Path, **options: Any) -> tuple[spf.SoftPromptModel, Path]:
    """A short run on a file; the model and the prompt's folder."""
    data = folder / "reviews.jsonl"
    folder.mkdir(exist_ok=True)
    data.write_text("".join(json.dumps(row) + "\n" for row in reviews(12)))
    rows = load_rows(data)
    task = classification_task(rows, prompt="p", model="org/base")
    model = spf.SoftPromptModel(build("llama"))
    settings = {"steps": 2, "eval_every": 2, "num_virtual_tokens": 4} | options
    result = tune(model, tiny_tokenizer(), task, rows[:8], rows[8:], folder / "run", **settings)
    return model, result.folder


def test_the_card_of_a_run(tmp_path: Path) -> None:
    _, folder = tuned_run(tmp_path, init_text=None)
    text = (folder / "README.md").read_text()
    data = ModelCard(text).data
    named = data.to_dict()
    assert [named[key] for key in ("library_name", "base_model", "pipeline_tag")] == [
        "peft",
        "org/base",
        "text-generation",
    ]
    assert {"soft-prompt", "prompt-tuning", "softprompt_fast", "base_model:adapter:org/base"} <= set(data.tags)
    metrics = json.loads((tmp_path / "run" / "metrics.json").read_text())
    after = metrics["after"]
    results = {result.metric_type: result for result in data.eval_results}
    assert results["accuracy"].metric_value == after["accuracy"] and results["loss"].metric_value == after["loss"]
    assert results["accuracy"].dataset_name == "reviews.jsonl"
    interval = f"{after['accuracy']:.3f} ({after['accuracy_low']:.3f} to {after['accuracy_high']:.3f})"
    assert interval in results["accuracy"].metric_name and f"| accuracy | {interval} |" in text
    assert "* Training: 8 rows, from `reviews.jsonl`" in text and "* Held out: 4 rows, from `reviews.jsonl`" in text
    assert json.dumps({"no": " no", "yes": " yes"}, indent=2) in text and "{text}\nLabel:" in text
    assert '"steps": 2' in text and torch.__version__ in text and "llama-3x32:" in text
    assert str(tmp_path) not in text and str(Path.cwd()) not in text
    assert metrics["data"]["train"] == {"files": ["reviews.jsonl"], "rows": 8}


def test_the_code_of_a_card_runs(tmp_path: Path, model_folder: Path) -> None:
    pytest.importorskip("peft")
    _, folder = tuned_run(tmp_path)
    codes = re.findall(r"```python\n(.*?)```", (folder / "README.md").read_text(), re.DOTALL)
    assert len(codes) == 2
    for code in codes:
        values: dict[str, Any] = {}
        exec(code.replace("org/base", str(model_folder)).replace("path/to/p", str(folder)), values)
        assert "model" in values


def test_equal_runs_give_equal_cards(tmp_path: Path) -> None:
    cards = [(tuned_run(tmp_path / name)[1] / "README.md").read_text() for name in ("a", "b")]
    assert cards[0] == cards[1]


def test_a_changed_card_is_kept(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, folder = tuned_run(tmp_path)
    card = folder / "README.md"
    text = card.read_text()
    assert is_ours(text) and write_card(folder) and card.read_text() == text
    for changed in (text.replace("# p", "# mine"), text + "more\n", "theirs"):
        card.write_text(changed)
        with caplog.at_level(logging.WARNING, "softprompt_fast"):
            model.save_pretrained(folder.parent, ["p"])
            assert not write_card(folder)
        assert card.read_text() == changed and "is kept" in caplog.text
    card.unlink()
    assert write_card(folder) and card.read_text() == text


def test_scores_are_left_out_when_the_prompt_has_changed(tmp_path: Path) -> None:
    model, folder = tuned_run(tmp_path)
    card = folder / "README.md"
    scored = card.read_text()
    model.save_pretrained(folder.parent, ["p"])
    assert card.read_text() == scored
    with torch.no_grad():
        model.prompts["p"].add_(1)
    model.save_pretrained(folder.parent, ["p"])
    text = card.read_text()
    assert is_ours(text) and "## Scores" not in text and "model-index" not in text and "## Task" in text


def test_checkpoints_and_prompts_without_a_task_have_no_card(tmp_path: Path) -> None:
    model, _ = tuned_run(tmp_path)
    cards = [file.relative_to(tmp_path).as_posix() for file in tmp_path.rglob("README.md")]
    assert cards == ["run/p/README.md"]
    model.save_pretrained(tmp_path / "plain")
    assert not (tmp_path / "plain" / "p" / "README.md").exists()


def test_a_task_that_cannot_be_read_costs_the_card_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model, folder = tuned_run(tmp_path)
    (folder / "task.json").write_text('{"encoding": 9}')
    with torch.no_grad():
        model.prompts["p"].add_(1)
    model.save_pretrained(folder.parent, ["p"])
    assert "gets no card" in caplog.text
    assert torch.equal(spf.prompts.read_prompt(folder)[0], model.prompts["p"])


def test_the_card_of_a_compression(tmp_path: Path) -> None:
    result = compressed(tmp_path)
    text = (result.recommended.folder / "README.md").read_text()
    measured = result.recommended.retention
    assert "## Retention" in text and f"| same token | {measured.agreement:.3f} |" in text
    assert f"| ROUGE-L F1 | {measured.rouge_l:.3f} |" in text and f"| same text | {measured.same_text:.3f} |" in text
    assert "Both continued 5 of them freely" in text
    (found,) = ModelCard(text).data.eval_results
    assert found.metric_type == "agreement" and found.metric_value == measured.agreement


def test_the_card_of_a_deep_prompt(tmp_path: Path) -> None:
    deep = spf.DeepPromptModel(build("llama"))
    deep.add_prompt("deep", 4)
    deep.save_pretrained(tmp_path)
    task = Task("generation", "{q}```\n", "a", prompt="deep")
    task.save(tmp_path / "deep")
    assert write_card(tmp_path / "deep")
    text = (tmp_path / "deep" / "README.md").read_text()
    assert "DeepPromptModel.from_pretrained" in text and "prefix-tuning" in text and "keys and values" in text
    assert "````text\n{q}```\n\n````" in text  # the template cannot close its block


def test_a_card_names_no_folders_of_this_machine() -> None:
    values = {"init": "/home/me/prompts/a", "rank": 8, "text": "a\n/b", "list": ["/x/y", "z/y"], "home": "~/a/b"}
    assert without_folders(values) == {"init": "a", "rank": 8, "text": "a\n/b", "list": ["y", "z/y"], "home": "b"}


def saved_with(folder: Path, name: str = "p", **changes: Any) -> Path:
    """The folder of a prompt whose adapter_config.json somebody has written."""
    model = spf.SoftPromptModel(build("llama"))
    model.add_prompt("p", 3)
    model.save_pretrained(folder / "saved")
    saved = (folder / "saved" / "p").rename(folder / name)
    config = json.loads((saved / "adapter_config.json").read_text())
    (saved / "adapter_config.json").write_text(json.dumps(config | changes))
    return saved


@pytest.mark.parametrize("key", ["base_model_name_or_path", "peft_type", "task_type"])
def test_the_configuration_of_others_writes_no_lines_of_the_card(key: str, tmp_path: Path) -> None:
    plain = card_body(card_facts(saved_with(tmp_path / "a", **{key: "x"})))
    foreign = "x`\n\n# Heading <img src=https://evil/x>\n```\n/home/me/x`\n"
    facts = card_facts(saved_with(tmp_path / "b", **{key: foreign}))
    text = card_body(facts)
    assert len(text.splitlines()) == len(plain.splitlines())
    assert [line for line in text.splitlines() if line.startswith("#")] == [
        line for line in plain.splitlines() if line.startswith("#")
    ]
    assert "<img" not in card_text(facts) and "/home/me" not in card_text(facts)


def test_names_of_folders_and_columns_end_no_code(tmp_path: Path) -> None:
    folder = saved_with(tmp_path, 'a") ; import os; os.system("`x`$(x)')
    Task("generation", "{q}", "a` # b\n\n# c", prompt='p"\n# d').save(folder)
    facts = card_facts(folder)
    text = card_text(facts)
    (code, _) = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    calls = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.Call)]
    assert len(calls) == 2 and "import os" not in code
    assert "predict --prompt path/to/a-import-os-os-system-x-x --data" in text
    assert "`` a` # b # c ``" in text and "# p-d\n" in text
    assert len(re.findall(r"^# ", text, re.MULTILINE)) == 1

    inside = facts.pushed("me/many", folder.name, None)
    text = card_text(inside)
    codes = re.findall(r"```python\n(.*?)```", text, re.DOTALL)
    strings = [node.value for node in ast.walk(ast.parse(codes[1])) if isinstance(node, ast.Constant)]
    assert folder.name in strings
    (command,) = [line for line in text.splitlines() if line.startswith("softprompt-fast predict")]
    assert shlex.split(command)[3] == f"me/many#{folder.name}"
    assert "](a%22%29%20%3B%20import" in several_text([inside, inside], "me/many")


def test_a_fingerprint_that_is_none_is_left_out(tmp_path: Path) -> None:
    folder = saved_with(tmp_path)
    known = card_facts(folder).fingerprint
    assert known is not None and known in card_text(card_facts(folder))
    weights = folder / "adapter_model.safetensors"
    save_file(load_file(weights), weights, {"base_fingerprint": "x`\n# Heading"})
    assert "Heading" not in card_text(card_facts(folder))


def test_the_form_that_peft_leaves_is_replaced_until_it_is_filled_in(tmp_path: Path) -> None:
    pytest.importorskip("peft")
    from support.peft_models import peft_model

    peft_model("llama", kind="PromptTuning").save_pretrained(tmp_path / "theirs")
    card = tmp_path / "theirs" / "README.md"
    form = card.read_text()
    version = re.search(r"- PEFT \S+", form)
    assert version is not None
    quantized = "The following `bitsandbytes` quantization config was used during training:\n- load_in_4bit: True\n\n"
    filled = (
        form.replace("- **License:** [More Information Needed]", "- **License:** MIT"),
        form.replace("library_name: peft", "library_name: peft\nlicense: mit"),
        form + "\nOurs.\n",
        form + "\n- License: MIT\n",
        form.replace(version[0], ""),
    )
    for text in filled:
        card.write_text(text)
        assert not write_card(card.parent) and card.read_text() == text
    for text in (form, form.replace("### Framework", quantized + "### Framework")):
        card.write_text(text)
        assert write_card(card.parent) and is_ours(card.read_text())
