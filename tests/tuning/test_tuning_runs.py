"""Tuning runs: order of rows, resumption, the model's modes afterwards, errors before any work."""

from __future__ import annotations

import json
import shutil
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from support.tiny_models import build
from support.tiny_reviews import reviews, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.prompts.placement import bos_vector
from softprompt_fast.tasks.task import Task, classification_task
from softprompt_fast.tuning.ensemble import tune_ensemble
from softprompt_fast.tuning.job import TuningJob, TuningResult
from softprompt_fast.tuning.run import tune, tune_tasks
from softprompt_fast.tuning.sampler import TaskSampler

COMMON: dict[str, Any] = {"batch_size": 16, "learning_rate": 0.1, "num_virtual_tokens": 4, "steps": 6}


def tuned(folder: Path, model: spf.SoftPromptModel | None = None, **options: Any) -> TuningResult:
    task = options.pop("task", None) or classification_task(reviews(), prompt="p")
    rows, apart = options.pop("rows", reviews()), options.pop("apart", reviews(8))
    model = model or spf.SoftPromptModel(build(options.pop("architecture", "llama")))
    return tune(model, options.pop("tokenizer", tiny_tokenizer()), task, rows, apart, folder, **COMMON | options)


# --- order of rows ---


def test_every_batch_holds_rows_of_each_task_of_similar_length() -> None:
    lengths = [[i % 17 for i in range(100)], [i % 5 for i in range(30)]]
    sampler = TaskSampler(lengths, 8, 0, by_length=True)
    order = list(sampler)
    assert len(order) == len(sampler) == 200
    for at in range(0, 192, 16):
        batch = order[at : at + 16]
        first, second = [i for i in batch if i < 100], [i for i in batch if i >= 100]
        assert len(first) == len(second) == 8
    spread = [max(part) - min(part) for part in ([lengths[0][i] for i in order[a : a + 8]] for a in range(0, 192, 16))]
    assert sum(spread) / len(spread) < 8  # 15 at random
    counts = Counter(order)
    assert all(counts[i] == 1 for i in range(100)) and {counts[i] for i in range(100, 130)} == {3, 4}


def test_the_order_is_of_seed_and_epoch_alone() -> None:
    def order(seed: int, epoch: int) -> list[int]:
        sampler = TaskSampler([list(range(40))], 8, seed, by_length=False)
        sampler.set_epoch(epoch)
        torch.rand(epoch + seed + 1)
        return list(sampler)

    assert order(0, 1) == order(0, 1) and len({tuple(order(s, e)) for s in (0, 1) for e in (0, 1)}) == 4


def test_a_run_that_is_resumed_behind_its_first_epoch_ends_as_if_it_were_not(tmp_path: Path) -> None:
    options: dict[str, Any] = {"steps": 12, "eval_every": 6, "prompt_dropout": 0.1}  # four steps an epoch
    tuned(tmp_path, **options)
    last = tmp_path / "checkpoints" / "checkpoint-12"
    whole = load_file(last / "bank.safetensors")
    shutil.rmtree(last)
    result = tuned(tmp_path, resume=True, **options)
    again = load_file(last / "bank.safetensors")
    assert all(torch.allclose(whole[name], again[name], atol=1e-6) for name in whole)
    assert [point["step"] for point in result.history] == [6, 12]


# --- resumption ---


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"learning_rate": 0.2}, "cannot resume: `learning_rate` was 0.1 when the run started, got 0.2"),
        ({"seed": 3}, "`seed` was 0 when the run started, got 3"),
        ({"num_virtual_tokens": 5}, "`num_virtual_tokens` was 4 when"),
        ({"reparameterization": "residual"}, "`reparameterization` was 'none' when"),
        ({"rows": reviews(40)}, "`train_rows of 'p'` was '64 rows"),
        ({"apart": reviews(6)}, "`held_out_rows of 'p'` was '8 rows"),
    ],
)
def test_a_run_is_resumed_as_it_began(tmp_path: Path, changed: dict[str, Any], message: str) -> None:
    tuned(tmp_path, steps=2)
    with pytest.raises(ValueError, match=message):
        tuned(tmp_path, resume=True, steps=4, **changed)


def test_resuming_a_finished_run_changes_nothing(tmp_path: Path) -> None:
    first = tuned(tmp_path)
    written = (tmp_path / "p" / "adapter_model.safetensors").read_bytes()
    again = tuned(tmp_path, resume=True)
    assert again.steps == first.steps == 6 and again.after == first.after and again.history == first.history
    assert (tmp_path / "p" / "adapter_model.safetensors").read_bytes() == written


def test_a_checkpoint_that_was_cut_off_is_passed_over(tmp_path: Path) -> None:
    tuned(tmp_path, eval_every=3)
    (tmp_path / "checkpoints" / "checkpoint-6" / "trainer_state.json").unlink()
    assert tuned(tmp_path, resume=True, eval_every=3).steps == 6


def test_a_run_before_its_first_checkpoint_is_not_overwritten(tmp_path: Path) -> None:
    tuned(tmp_path)
    shutil.rmtree(tmp_path / "p")
    for checkpoint in tmp_path.glob("checkpoints/checkpoint-*"):
        shutil.rmtree(checkpoint)
    with pytest.raises(
        FileExistsError, match=r"run\.json already exists; resume the run, or choose another output folder"
    ):
        tuned(tmp_path)
    assert tuned(tmp_path, resume=True).steps == 6


def test_a_run_is_resumed_on_its_own_base_model(tmp_path: Path) -> None:
    tuned(tmp_path)
    with pytest.raises(ValueError, match=r"`model` was 'SoftPromptModel on .*Llama.* when the run started, got"):
        tuned(tmp_path, resume=True, architecture="gpt2")


def test_scores_that_are_not_finite_end_a_run(tmp_path: Path) -> None:
    model = spf.SoftPromptModel(build("llama"))
    with torch.no_grad():
        next(model.base_model.parameters()).fill_(float("nan"))
    with pytest.raises(FloatingPointError, match="held-out loss of 'p' is nan at step 1; try a smaller"):
        tuned(tmp_path, model, init="random", eval_every=1)


# --- the model afterwards ---


def test_tuning_leaves_modes_and_other_prompts_as_they_were(tmp_path: Path) -> None:
    model = spf.SoftPromptModel(build("gpt2")).eval()
    model.add_prompt("other", init=torch.randn(2, 32))
    tuned(tmp_path, model)
    assert not any(module.training for module in model.modules()) and model.prompts["other"].requires_grad
    ids = torch.tensor([[5, 6, 7]])
    assert torch.equal(model.next_token_logits(ids, None, "p"), model.next_token_logits(ids, None, "p"))


def test_after_a_failure_the_model_can_be_used_on(tmp_path: Path) -> None:
    class Breaks:
        def __getattr__(self, name: str) -> Any:
            def callback(args: Any, state: Any, control: Any, **_: Any) -> Any:
                if name == "on_step_end" and state.global_step == 2:
                    raise RuntimeError("out of luck")
                return control

            return callback

    model = spf.SoftPromptModel(build("llama"))
    other = model.add_prompt("other", init=torch.randn(2, 32))
    with pytest.raises(RuntimeError, match="out of luck"):
        tuned(tmp_path / "a", model, reparameterization="residual", callbacks=[Breaks()])
    assert other.requires_grad and type(model.prompts) is spf.FastSoftPrompt and "p" in model.prompts
    assert tuned(tmp_path / "b", model).steps == 6


def test_a_refused_run_adds_no_prompt(tmp_path: Path) -> None:
    model = spf.SoftPromptModel(build("llama"))
    with pytest.raises(ValueError, match="`rank` must be 1 to 4"):
        tuned(tmp_path, model, reparameterization="low-rank", rank=8)
    assert model.prompts.names == []


@pytest.mark.parametrize("row", [{"text": "", "label": "no"}, {"text": "film", "label": None}])
def test_rows_without_text_or_label_are_refused(tmp_path: Path, row: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match="in each row of 'p', 1 of 65 lack one: row 64 has no"):
        tuned(tmp_path, rows=[*reviews(), row])


def test_the_callers_task_is_not_changed(tmp_path: Path) -> None:
    task = classification_task(reviews(), prompt="p")
    result = tuned(tmp_path, task=task, placement="after_bos")
    assert task.special_tokens and not Task.load(result.folder).special_tokens


# --- after BOS ---


def test_a_prompt_from_behind_bos_starts_others_without_its_first_vector(tmp_path: Path) -> None:
    source = spf.SoftPromptModel(build("llama"))
    tuned(tmp_path / "source", source, placement="after_bos")
    values = source.prompts.snapshot("p")
    start: dict[str, Any] = {"init": str(tmp_path / "source" / "p"), "num_virtual_tokens": None, "learning_rate": 1e-12}
    before, behind = spf.SoftPromptModel(build("llama")), spf.SoftPromptModel(build("llama"))
    tuned(tmp_path / "before", before, **start)
    tuned(tmp_path / "behind", behind, placement="after_bos", **start)
    assert torch.allclose(before.prompts.snapshot("p"), values[1:], atol=1e-6)
    assert torch.allclose(behind.prompts.snapshot("p"), values, atol=1e-6)
    assert torch.equal(values[0], bos_vector(source, tiny_tokenizer()))


def test_places_behind_bos_that_cannot_be_right_are_refused(tmp_path: Path) -> None:
    job = TuningJob(classification_task(reviews(), prompt="p"), reviews(), reviews(8))
    model = spf.SoftPromptModel(build("llama"))
    with pytest.raises(ValueError, match="`shared_tokens` cannot be combined with placement='after_bos'"):
        tune_tasks(model, tiny_tokenizer(), [job], tmp_path, placement="after_bos", shared_tokens=2)
    model.add_prompt("p", init=torch.randn(2, 32))
    with pytest.raises(ValueError, match="'p', which does not begin with BOS"):
        tuned(tmp_path, model, placement="after_bos")
    with pytest.raises(
        ValueError, match="`shared_tokens` cannot be combined with a prompt that the model already has: 'p'"
    ):
        tune_tasks(model, tiny_tokenizer(), [job], tmp_path, shared_tokens=2)
    with pytest.raises(ValueError, match="placement='after_bos' cannot be combined with encoder-decoders"):
        tuned(tmp_path, architecture="t5", placement="after_bos")


# --- initial values, errors ---


def test_members_that_would_start_alike_do_not(tmp_path: Path) -> None:
    model = spf.SoftPromptModel(build("llama"))
    task = classification_task(reviews(), prompt="p")
    options = COMMON | {"learning_rate": 1e-12, "num_virtual_tokens": 30}
    tune_ensemble(model, tiny_tokenizer(), task, reviews(16), reviews(8), tmp_path, members=3, **options)
    first, *others = (model.prompts.snapshot(f"p-{i}") for i in range(3))
    for other in others:
        share = (other - first).std() / first.std()
        assert 0.05 < share < 0.2
    assert not torch.equal(*others)


def test_only_distances_from_the_start_decay(tmp_path: Path) -> None:
    """Shared vectors have no start of their own: their decay would be one towards zero."""
    job = TuningJob(classification_task(reviews(), prompt="p"), reviews(), reviews(8))
    found = []
    for decay in (0.0, 5.0):
        model = spf.SoftPromptModel(build("llama"))
        options = COMMON | {"decay_to_initial": decay, "learning_rate": 1e-3, "steps": 1, "eval_every": 1}
        tune_tasks(model, tiny_tokenizer(), [job], tmp_path / str(decay), shared_tokens=2, **options)
        found.append(model.prompts.snapshot("p"))
    assert torch.allclose(found[0][:2], found[1][:2], atol=1e-5)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rows": []}, "`train_rows` must hold at least one row, got none for 'p'"),
        ({"apart": []}, "`held_out_rows` must hold at least one row"),
        ({"rows": [{"text": "very " * 130, "label": "yes"}]}, "`max_length` must leave room for 4 virtual tokens"),
        ({"init_text": "fine"}, "`init_text` cannot be combined with an `init` other than text"),
        ({"reparameterization": "low-rank", "decay_to_initial": 0.1}, "`decay_to_initial` cannot be combined with"),
    ],
)
def test_mistakes_are_told_before_anything_runs(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        tuned(tmp_path, **options)


def test_names_that_cannot_be_folders_are_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="`name` must be 1 to 128 letters"):
        tuned(tmp_path, task=classification_task(reviews(), prompt="movie reviews"))


def test_answers_need_an_end(tmp_path: Path) -> None:
    tokenizer = tiny_tokenizer()
    tokenizer.eos_token = None
    task = Task("generation", "{text}", "label", prompt="p")
    with pytest.raises(ValueError, match="`tokenizer` must have an end-of-sequence token"):
        tuned(tmp_path, task=task, tokenizer=tokenizer)


def test_rows_without_a_label_make_no_label() -> None:
    assert classification_task([*reviews(4), {"text": "film", "label": None}]).labels == ["no", "yes"]
    with pytest.raises(ValueError, match="`label_words` must give a word for each label"):
        Task("classification", "{text}", "label", {"a": " fine", "b": ""})


def test_facts_of_a_run_are_json(tmp_path: Path) -> None:
    tuned(tmp_path, init=torch.randn(3, 32), num_virtual_tokens=None)
    facts = json.loads((tmp_path / "checkpoints" / "run.json").read_text())
    assert facts["init"] == "tensor [3, 32]" and facts["shared_tokens"] == 0
