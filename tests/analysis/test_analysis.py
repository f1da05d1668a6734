"""Looking at data and prompts: analysis, interpretation, pruning, transfer, from Python and the command line."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from support.tiny_models import build
from support.tiny_reviews import BAD, GOOD, WORDS, reviews, run, tiny_tokenizer

import softprompt_fast as spf
from softprompt_fast.analysis.data_analysis import Analysis, analyze
from softprompt_fast.analysis.duplicates import find_duplicates, normalise
from softprompt_fast.analysis.figures import analysis_figure, interpretation_figure, pruning_figure, similarity_figure
from softprompt_fast.analysis.interpretation import CAVEAT, interpret, without
from softprompt_fast.analysis.pruning import apply_mask, prune
from softprompt_fast.analysis.similarity import aligned_cosine, mean_cosine, pairwise_cosine
from softprompt_fast.analysis.transfer import NO_PROMPT, similar
from softprompt_fast.base.figures import save_figure
from softprompt_fast.evaluation.intervals import mean_interval
from softprompt_fast.evaluation.predictions import evaluate
from softprompt_fast.evaluation.scoring import score_prompts
from softprompt_fast.tasks.examples import usable_rows
from softprompt_fast.tasks.task import Task, classification_task, generation_task

TASKS = {
    "one-token": classification_task(reviews(), prompt="p"),
    "several-tokens": Task("classification", "{text}", "label", {"yes": " very fine", "no": " dull"}, prompt="p"),
    "generation": generation_task(input_column="text", output_column="label", prompt="p"),
}


def tuned_on(architecture: str = "llama", **prompts: torch.Tensor) -> spf.SoftPromptModel:
    tuned = spf.SoftPromptModel(build(architecture))
    for name, values in prompts.items():
        tuned.add_prompt(name, init=values)
    return tuned


def sane(values: Any) -> Any:
    """What a JSON file would give back; NaN and infinity are no JSON."""
    return json.loads(json.dumps(values, allow_nan=False))


# --- scoring ---


@pytest.mark.parametrize("architecture", ["llama", "bloom", "t5"])
@pytest.mark.parametrize("kind", TASKS)
def test_mixed_batches_score_every_prompt_as_evaluate_does(architecture: str, kind: str) -> None:
    prompts = {"a": torch.randn(3, 32), "b": torch.randn(5, 32), "none": None, "empty": torch.empty(0, 32)}
    rows, task, tokenizer = reviews(10), TASKS[kind], tiny_tokenizer()
    found = score_prompts(tuned_on(architecture), tokenizer, task, rows, prompts, batch_size=7)
    for name, values in prompts.items():
        alone = tuned_on(architecture) if values is None or len(values) == 0 else tuned_on(architecture, p=values)
        expected = evaluate(alone, tokenizer, task, rows)
        summary = found[name].summary()
        assert summary["loss"] == pytest.approx(expected["loss"], abs=1e-4), name
        shared = {key: expected[key] for key in expected if key in summary}
        assert {"rows", "perplexity" if kind == "generation" else "accuracy_low"} <= set(shared)
        assert {key: summary[key] for key in shared} == pytest.approx(shared, rel=1e-3), name
    assert found["none"].loss == pytest.approx(found["empty"].loss) != pytest.approx(found["a"].loss)


def test_scores_keep_the_model_as_it_was_and_report_progress() -> None:
    tuned, done = tuned_on(p=torch.randn(3, 32)).train(), []
    score_prompts(tuned, tiny_tokenizer(), TASKS["one-token"], reviews(5), {"a": None, "b": None}, progress=done.append)
    assert tuned.training and sum(done) == 10 and tuned.prompts.names == ["p"]


def test_interval_of_a_mean_is_the_textbook_one() -> None:
    values = torch.tensor([1.0, 2.0, 4.0, 5.0], dtype=torch.float64)
    low, high = mean_interval(values, torch.ones(4))
    half = 1.959964 * values.std().item() / 2
    assert (low, high) == pytest.approx((3 - half, 3 + half))
    wide = mean_interval(values, torch.tensor([1.0, 2.0, 4.0, 5.0]))
    assert wide == pytest.approx((1.0, 1.0))  # the ratio is the same in every row


def test_rows_without_text_or_label_are_left_out(caplog: pytest.LogCaptureFixture) -> None:
    bad = [{"text": " ", "label": "yes"}, {"text": "film", "label": None}, {"text": "film", "label": "maybe"}]
    assert usable_rows(TASKS["one-token"], bad + reviews(2)) == reviews(2)
    assert "3 of 5 rows are left out" in caplog.text
    with pytest.raises(ValueError, match="`rows` must hold rows with text and 'label', got none among 3"):
        usable_rows(TASKS["one-token"], bad)
    with pytest.raises(ValueError, match=r"prompt 'a' must have shape \[P, 32\] for this model, got \[2, 8\]"):
        score_prompts(tuned_on(), tiny_tokenizer(), TASKS["one-token"], reviews(2), {"a": torch.randn(2, 8)})


# --- analysis ---


def analysed(rows: Any, held_out: Any = (), task: Task | None = None, **options: Any) -> Analysis:
    return analyze(tuned_on(), tiny_tokenizer(), task or TASKS["one-token"], rows, held_out, **options)


def test_normalised_texts() -> None:
    assert normalise("  A  Fine—film!! ") == normalise("a fine film") != normalise("a fine plot")
    assert normalise("!!") != normalise("??") and normalise("ﬁne") == normalise("FINE")


def test_repeats_contradictions_and_leaks_are_counted() -> None:
    rows = [
        {"text": "fine film", "label": "yes"},
        {"text": "fine film", "label": "yes"},
        {"text": "Fine film!", "label": "no"},
        {"text": "dull film", "label": "no"},
        {"text": "great", "label": None},
    ]
    held_out = [
        {"text": "dull film", "label": "no"},
        {"text": "DULL film", "label": "no"},
        {"text": "new", "label": "no"},
    ]
    found = find_duplicates(TASKS["one-token"], rows, held_out)
    assert (found.exact, found.near, found.conflicts) == (1, 1, 3)
    assert (found.leaks_exact, found.leaks_near) == (1, 1)
    assert found.conflict_examples == ["fine film"] and found.leak_examples == ["dull film", "DULL film"]
    assert find_duplicates(TASKS["generation"], rows, []).conflicts == 0


def test_lengths_and_limits_are_those_of_the_encoded_texts() -> None:
    rows = reviews(64)
    task = classification_task(rows, max_length=6)
    found = analysed(rows, task=task, sample=0)
    lengths = [len(tiny_tokenizer()(task.text(row)).input_ids) for row in rows]
    assert found.text.tokens == lengths and found.text.quantiles["max"] == max(lengths) == 8
    assert found.cut_by_max_length == sum(n > 6 for n in lengths) / 64 > 0
    assert found.context == 128 and found.over_context == 0.0 and found.target.quantiles["max"] == 1
    assert found.zero_shot is None
    assert found.recipe.choices["max_length"].value == 8
    assert any("lose their beginning; 8 is suggested" in warning for warning in found.recipe.warnings)
    long = [row | {"text": "very " * 130} for row in rows]
    found = analysed(long, sample=0)
    assert found.over_context == 1.0 and found.recipe.choices["max_length"].value == 128 - 10 - 1
    assert "leaves beside the prompt" in found.recipe.choices["max_length"].reason


def test_baselines_are_what_evaluate_and_counting_give() -> None:
    rows, held_out = reviews(64)[:33], reviews(64)[33:]
    rows += [row for row in rows if row["label"] == "no"]
    found = analysed(rows, held_out)
    bare = evaluate(tuned_on(), tiny_tokenizer(), TASKS["one-token"], held_out)
    assert found.zero_shot is not None and found.majority is not None
    for key in ("accuracy", "accuracy_low", "accuracy_high", "loss"):
        assert found.zero_shot[key] == pytest.approx(bare[key], abs=1e-5)
    share = sum(row["label"] == "no" for row in held_out) / len(held_out)
    assert (found.majority["label"], found.majority["accuracy"]) == ("no", share)
    assert sum(found.zero_shot_answers.values()) == len(held_out)
    assert analysed(rows, held_out, sample=7).zero_shot["rows"] == 7  # type: ignore[index]


def test_warnings_stand_for_what_is_wrong_and_nothing_else() -> None:
    rows = [
        {"text": f"{word} film {'very ' * i}", "label": label}
        for i in range(60)
        for word, label in [*((w, "yes") for w in GOOD), *((w, "no") for w in BAD)]
    ]
    held_out = [{"text": f"plot {row['text']}", "label": row["label"]} for row in rows]
    clean = analysed(rows, held_out, sample=0).recipe
    assert clean.warnings == []
    assert clean.choices["batch_size"].value == 32 and clean.choices["num_virtual_tokens"].value == 20
    bad = [row for row in rows if row["label"] == "yes"][:50]
    bad += [{"text": bad[0]["text"], "label": "no"}, {"text": None, "label": "no"}, {"text": "new", "label": None}]
    bad += [{"text": "plot", "label": "perhaps"}] + bad[:5]
    said = "\n".join(analysed(bad, [bad[0]], sample=0).recipe.warnings)
    for expected in (
        "too few rows: 56",
        "few held-out rows: 1 ",
        "1 of 59 training rows have no text",
        "1 of 59 training rows have no label",
        "labels that the task does not name: ['perhaps']",
        "fewer than 10 rows of 'no'",
        "imbalance: 55 rows of the largest class, 1 of the smallest",
        "leak: 1 held-out rows",
        "training rows have a text that also stands with another label",
        "training rows repeat an earlier text",
    ):
        assert expected in said, (expected, said)


def test_label_words_of_several_tokens_and_clashes() -> None:
    task = Task("classification", "{text}", "label", {"yes": " very fine", "no": " very dull"})
    found = analysed(reviews(), task=task, sample=0)
    assert [len(word.ids) for word in found.label_words.values()] == [2, 2]
    assert found.label_words["yes"].tokens == ["very", "fine"] and found.first_token_clashes == [["yes", "no"]]
    said = "\n".join(found.recipe.warnings)
    assert "multi-token label words ('yes' 2, 'no' 2)" in said and "begin with the same token" in said
    assert "scored whole" in found.recipe.choices["label_words"].reason
    # "Yes" is unknown to the tokenizer, "yes" is one token.
    shouted = Task("classification", "{text}", "label", {"yes": " YES :", "no": " no"})
    assert "scored whole" in analysed(reviews(), task=shouted, sample=0).recipe.choices["label_words"].reason
    spelt = Task("classification", "{text}", "label", {"yes": " Great", "no": " GREAT"})
    found = analysed(reviews(), task=spelt, sample=0)
    assert found.first_token_clashes == [["yes", "no"]]  # both are the unknown token


def test_generation_tasks_have_lengths_and_no_classes(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": "very fine film"} for row in reviews()]
    found = analysed(rows, rows[:9], task=TASKS["generation"])
    assert found.target.quantiles["max"] == 4 and found.classes == {} and found.majority is None
    assert found.zero_shot is not None and found.zero_shot["loss_low"] < found.zero_shot["loss"]
    assert "label_words" not in found.recipe.choices and found.recipe.choices["init"].value == "vocabulary"
    assert sane(found.to_json())["zero_shot"]["perplexity"] > 1
    save_figure(analysis_figure(found), tmp_path / "a.svg")


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "film", "label": None}],
        [{"text": "", "label": "yes"}],
        [{"text": "film", "label": "yes"}],
    ],
)
def test_data_with_next_to_nothing_in_them_are_analysed_too(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    found = analysed(rows)
    assert any("too few rows" in warning for warning in found.recipe.warnings)
    assert "tokens" not in sane(found.to_json())["text"]
    save_figure(analysis_figure(found), tmp_path / "a.png")


def test_encoder_decoders_are_analysed() -> None:
    found = analyze(tuned_on("t5"), tiny_tokenizer(), TASKS["one-token"], reviews(), reviews(8))
    assert found.context is None and found.zero_shot is not None and found.target.quantiles["max"] == 2


# --- interpretation ---


def test_neighbours_and_norms_against_brute_force() -> None:
    tuned = tuned_on()
    table = tuned.get_input_embeddings().weight[: len(WORDS)].detach()
    prompt = torch.stack([table[4] * 3, table[7] * 0.5, torch.randn(32)])
    reading = interpret(tuned, tiny_tokenizer(), {"p": prompt}, k=3).prompts["p"]
    assert [(n[0].token, n[0].value) for n in reading.cosine[:2]] == [
        ("fine", pytest.approx(1.0)),
        ("dull", pytest.approx(1.0)),
    ]
    cosines = torch.nn.functional.cosine_similarity(prompt[:, None], table[None], dim=-1)
    for i in range(3):
        assert [n.id for n in reading.cosine[i]] == cosines[i].topk(3).indices.tolist()
        nearest = (table - prompt[i]).norm(dim=1).topk(3, largest=False)
        assert [n.id for n in reading.euclidean[i]] == nearest.indices.tolist()
        assert [n.value for n in reading.euclidean[i]] == pytest.approx(nearest.values.tolist(), abs=1e-4)
    assert reading.norms == pytest.approx(prompt.norm(dim=1).tolist())
    assert reading.norm_ranks[0] > 0.9 and reading.norm_ranks[1] < 0.1
    assert [reading.token_cosines[i][i] for i in range(3)] == pytest.approx([1.0] * 3)


def test_neighbours_across_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    prompt = {"p": torch.randn(4, 32)}
    whole = interpret(tuned_on(), tiny_tokenizer(), prompt, k=100).prompts["p"]
    monkeypatch.setattr("softprompt_fast.analysis.interpretation.CHUNK", 5)
    parts = interpret(tuned_on(), tiny_tokenizer(), prompt, k=100).prompts["p"]
    for a, b in ((whole.cosine, parts.cosine), (whole.euclidean, parts.euclidean)):
        assert [[n.id for n in row] for row in a] == [[n.id for n in row] for row in b]
    assert len(whole.cosine[0]) == len(WORDS)  # k is no more than there are


def test_scaled_embeddings_are_read_as_the_model_sees_them() -> None:
    tuned = tuned_on("gemma3")
    prompt = tuned.add_prompt("p", init="text", init_text="fine dull", tokenizer=tiny_tokenizer())
    reading = interpret(tuned, tiny_tokenizer(), {"p": prompt}).prompts["p"]
    assert [n[0].token for n in reading.euclidean] == ["fine", "dull"]
    assert reading.euclidean[0][0].value == pytest.approx(0.0, abs=1e-3)


def test_cosines_between_prompts() -> None:
    a, b = torch.randn(4, 32), torch.randn(2, 32)
    found = interpret(tuned_on(), tiny_tokenizer(), {"a": a, "b": b, "longer": torch.cat([b, a])})
    assert found.mean_cosine[0][1] == pytest.approx(mean_cosine(a, b)) == pytest.approx(mean_cosine(b, a))
    assert found.aligned_cosine[1][2] == pytest.approx(1.0) and found.aligned_cosine[0][2] < 0.9
    assert pairwise_cosine(a, a) < aligned_cosine(a, a) == pytest.approx(1.0)


@pytest.mark.parametrize("kind", TASKS)
def test_ablation_is_the_difference_of_two_evaluations(kind: str) -> None:
    prompt, rows, task = torch.randn(3, 32), reviews(12), TASKS[kind]
    found = interpret(tuned_on(), tiny_tokenizer(), {"p": prompt}, task=task, rows=rows, batch_size=5).ablation
    assert found is not None and len(found.loss_change) == 3 and len(set(found.loss_change)) == 3
    whole = evaluate(tuned_on(p=prompt), tiny_tokenizer(), task, rows)
    for i in range(3):
        less = evaluate(tuned_on(p=without(prompt, i)), tiny_tokenizer(), task, rows)
        assert found.loss_change[i] == pytest.approx(less["loss"] - whole["loss"], abs=1e-4)
        if found.accuracy_change is not None:
            assert found.accuracy_change[i] == pytest.approx(less["accuracy"] - whole["accuracy"])
    assert all(half > 0 for half in found.loss_change_half_width)


@pytest.mark.parametrize("length", [1, 120])
def test_a_prompt_of_one_vector_and_one_longer_than_the_vocabulary(length: int, tmp_path: Path) -> None:
    prompts = {"p$_1$": torch.randn(length, 32)}
    rows = [*reviews(2), {"text": "", "label": "yes"}]
    tuned = tuned_on("gpt2") if length == 1 else tuned_on()
    found = interpret(tuned, tiny_tokenizer(), prompts, task=TASKS["one-token"], rows=rows, k=1)
    assert len(found.ablation.loss_change) == length and found.ablation.rows == 2  # type: ignore[union-attr]
    sane(found.to_json())
    save_figure(interpretation_figure(found), tmp_path / "p.png")


def test_the_output_itself_says_that_neighbours_explain_nothing(tmp_path: Path) -> None:
    found = interpret(tuned_on(), tiny_tokenizer(), {"a": torch.randn(2, 32), "b": torch.randn(3, 32)})
    assert "not an explanation" in CAVEAT and "2112.08348" in CAVEAT
    assert found.to_json()["caveat"] == CAVEAT
    drawn = save_figure(interpretation_figure(found), tmp_path / "p.svg")
    assert drawn.stat().st_size > 1000
    assert " ".join(interpretation_figure(found).get_suptitle().split()) == CAVEAT


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": {}}, "`prompts` must hold at least one"),
        ({"k": 0}, "`k` must be at least 1, got 0"),
        ({"rows": reviews(2)}, "`task` must be given with rows"),
        ({"rows": reviews(2), "task": TASKS["one-token"]}, "`ablate` must name one of the 2 prompts"),
        ({"rows": reviews(2), "task": TASKS["one-token"], "ablate": "c"}, "`ablate` must be one of"),
    ],
)
def test_mistakes_of_interpret(options: dict[str, Any], message: str) -> None:
    prompts = {"a": torch.randn(2, 32), "b": torch.randn(3, 32)}
    with pytest.raises(ValueError, match=message):
        interpret(tuned_on(), tiny_tokenizer(), **{"prompts": prompts} | options)


# --- pruning ---


def helpful_prompt(task: Task) -> torch.Tensor:
    """Two vectors trained for a moment, and three of noise that was never looked at."""
    tuned, tokenizer = tuned_on(p=torch.randn(2, 32) * 0.25), tiny_tokenizer()
    from softprompt_fast.tasks.collation import Collator
    from softprompt_fast.tasks.encoding import encode

    batch = Collator(0)(encode(task, reviews(64), tokenizer))
    optimizer = torch.optim.Adam(tuned.prompts.parameters(), lr=0.1)
    for _ in range(40):
        optimizer.zero_grad()
        tuned(batch["input_ids"], batch["attention_mask"], batch["labels"], "p").loss.backward()
        optimizer.step()
    noise = torch.randn(3, 32) * 1.5
    return torch.cat([noise[:1], tuned.prompts["p"].detach(), noise[1:]])


@pytest.mark.parametrize("rescore", [False, True])
def test_pruning_removes_noise_and_keeps_what_helps(rescore: bool, tmp_path: Path) -> None:
    task = TASKS["one-token"]
    prompt = helpful_prompt(task)
    before = prompt.clone()
    found = prune(tuned_on(), tiny_tokenizer(), task, prompt, reviews(32), reviews(64)[32:], rescore=rescore)
    assert torch.equal(prompt, before)
    assert found.removed and {1, 2} <= set(found.kept) and sorted(found.kept + found.removed) == [0, 1, 2, 3, 4]
    assert torch.equal(found.prompt, prompt[found.kept])
    for part, rows in ((found.selection, reviews(32)), (found.held_out, reviews(64)[32:])):
        for when, values in (("before", prompt), ("after", found.prompt)):
            expected = evaluate(tuned_on(p=values), tiny_tokenizer(), task, rows)
            assert part[when]["loss"] == pytest.approx(expected["loss"], abs=1e-4)
    assert found.selection["after"]["loss"] <= found.selection["before"]["loss"]
    sane(found.to_json())
    save_figure(pruning_figure(found), tmp_path / "p.svg")
    own = found.save(tuned_on(), task, tmp_path / "out")
    again = spf.SoftPromptModel.from_pretrained(build("llama"), own)
    assert torch.equal(again.prompts["p"], found.prompt) and Task.load(own) == task
    with pytest.raises(FileExistsError, match="must not exist"):
        found.save(tuned_on(), task, tmp_path / "out")


def test_pruning_stops_at_min_tokens_and_with_a_prompt_that_is_needed() -> None:
    task = TASKS["one-token"]
    options: dict[str, Any] = {"selection_rows": reviews(16), "held_out_rows": reviews(8)}
    prompt = torch.randn(4, 32)
    found = prune(tuned_on(), tiny_tokenizer(), task, prompt, tolerance=1e9, min_tokens=2, **options)
    assert len(found.kept) == 2
    first = found.loss_changes
    assert found.removed[0] == min(range(4), key=first.__getitem__)
    one = prune(tuned_on(), tiny_tokenizer(), task, prompt[:1], tolerance=1e9, **options)
    assert one.kept == [0] and one.removed == []
    for bad, message in (({"min_tokens": 5}, "`min_tokens` must be 1 to 4"), ({"pieces": 5}, "`pieces` must divide")):
        with pytest.raises(ValueError, match=message):
            prune(tuned_on(), tiny_tokenizer(), task, prompt, **options, **bad)


def test_pruning_keeps_the_vector_of_bos() -> None:
    task = replace(TASKS["one-token"], special_tokens=False)
    options: dict[str, Any] = {"selection_rows": reviews(16), "held_out_rows": reviews(8), "tolerance": 1e9}
    found = prune(tuned_on(), tiny_tokenizer(), task, torch.randn(4, 32), **options, pieces=2)
    assert len(found.kept) == 1 and found.kept == [0] and len(found.loss_changes) == 4


def test_pieces_are_set_to_zero_in_kept_vectors() -> None:
    task = TASKS["one-token"]
    found = prune(tuned_on(), tiny_tokenizer(), task, helpful_prompt(task), reviews(16), reviews(8), pieces=16)
    zero = (found.prompt.view(len(found.kept), 16, 2) == 0).all(-1)
    assert found.zeroed_pieces == zero.sum() > 0 and not zero.all(1).any()
    mask = torch.tensor([[True, False], [False, False]])
    assert apply_mask(torch.ones(2, 4), mask).tolist() == [[1, 1, 0, 0]]


# --- transfer ---


def test_sources_are_ranked_by_the_loss_on_the_rows(tmp_path: Path) -> None:
    task = TASKS["one-token"]
    helpful = helpful_prompt(task)[1:3]
    sources = {"noise": torch.randn(6, 32), "helpful": helpful, "flipped": -helpful}
    rows = [*reviews(20), {"text": "film", "label": None}]
    found = similar(tuned_on(), tiny_tokenizer(), task, rows, sources, target=helpful, batch_size=6)
    assert found[0].name == "helpful" and {s.name for s in found} == {*sources, NO_PROMPT}
    losses = [s.scores["loss"] for s in found if s.scores]
    assert losses == sorted(losses) and len(losses) == 4
    for source in found:
        alone = tuned_on() if source.name == NO_PROMPT else tuned_on(p=sources[source.name])
        assert source.scores["loss"] == pytest.approx(  # type: ignore[index]
            evaluate(alone, tiny_tokenizer(), task, reviews(20))["loss"], abs=1e-4
        )
    cosines = {s.name: s.mean_cosine for s in found}
    assert cosines["helpful"] == pytest.approx(1.0) and cosines["flipped"] == pytest.approx(-1.0)
    assert cosines[NO_PROMPT] is None
    sane([s.to_json() for s in found])
    save_figure(similarity_figure(found), tmp_path / "s.svg")


def test_sources_without_rows_are_ranked_by_cosine(tmp_path: Path) -> None:
    target = torch.randn(3, 32)
    sources = {"far": -target, "near": target + 0.1 * torch.randn(3, 32), "other": torch.randn(7, 32)}
    found = similar(tuned_on(), tiny_tokenizer(), None, [], sources, target)
    assert [s.name for s in found] == ["near", "other", "far"] and found[0].scores is None
    save_figure(similarity_figure(found), tmp_path / "s.svg")
    for arguments, message in (
        ((None, [], sources), "`rows` or `target` must be given"),
        ((None, reviews(2), sources), "`task` must be given with rows"),
        ((None, [], {}, target), "`sources` must hold at least one prompt"),
    ):
        with pytest.raises(ValueError, match=message):
            similar(tuned_on(), tiny_tokenizer(), *arguments)


# --- the command line ---


@pytest.fixture
def files(tmp_path: Path, model_folder: Path) -> dict[str, str]:
    data = tmp_path / "reviews.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in reviews(24)))
    tuned = tuned_on(first=torch.randn(3, 32), second=torch.randn(4, 32))
    tuned.save_pretrained(tmp_path / "prompts")
    for name in tuned.prompts:
        classification_task(reviews(), prompt=name, model=str(model_folder)).save(tmp_path / "prompts" / name)
    return {"data": str(data), "model": str(model_folder), "prompts": str(tmp_path / "prompts")}


def test_analyze_command(files: dict[str, str], tmp_path: Path) -> None:
    report, figure = tmp_path / "deep" / "a.json", tmp_path / "a.svg"
    common = ["-m", files["model"], "-d", files["data"], "--dtype", "float32", "--held-out", "8"]
    shown = run("analyze", *common, "-o", str(report), "--figure", str(figure)).output
    found = json.loads(report.read_text())
    assert found["classes"] == {"no": 8, "yes": 8} and found["zero_shot"]["rows"] == 8
    assert "Recipe" in shown and "too few rows" in shown and "softprompt-fast train --virtual-tokens 10" in shown
    assert "<svg" in figure.read_text()
    run("analyze", *common, "--task", "generation", "--input-column", "text", "--output-column", "label")


def test_interpret_command(files: dict[str, str], tmp_path: Path) -> None:
    report, figure = tmp_path / "i.json", tmp_path / "i.svg"
    common = ["interpret", "-p", files["prompts"], "--dtype", "float32"]
    shown = run(*common, "-d", files["data"], "--ablate", "second", "-o", str(report), "--figure", str(figure)).output
    found = json.loads(report.read_text())
    assert "not an explanation" in found["caveat"] and "not an explanation" in " ".join(shown.split())
    assert found["ablation"]["prompt"] == "second" and len(found["ablation"]["loss_change"]) == 4
    assert set(found["prompts"]) == {"first", "second"} and figure.is_file()
    with pytest.raises(ValueError, match="--ablate must name one of the 2 prompts"):
        run(*common, "-d", files["data"])
    one = run("interpret", "-p", f"{files['prompts']}/first", "-d", files["data"], "--dtype", "float32").output
    assert "whole prompt on 24 rows" in one


def test_prune_command(files: dict[str, str], tmp_path: Path) -> None:
    out, figure = tmp_path / "short", tmp_path / "p.svg"
    command = ["prune", "-p", f"{files['prompts']}/second", "-d", files["data"], "-o", str(out), "--dtype", "float32"]
    shown = run(*command, "--min-tokens", "2", "--tolerance", "100", "--figure", str(figure)).output
    assert "2 kept" in shown and "other rows, 12" in shown and figure.is_file()
    assert len(json.loads((out / "pruning.json").read_text())["removed"]) == 2
    scores = json.loads(run("evaluate", "-p", str(out), "-d", files["data"], "--dtype", "float32").stdout)
    assert scores["rows"] == 24
    with pytest.raises(FileExistsError):
        run(*command)


def test_similar_command(files: dict[str, str], tmp_path: Path) -> None:
    report, figure = tmp_path / "s.json", tmp_path / "s.svg"
    common = ["similar", "-p", files["prompts"], "--dtype", "float32"]
    run(*common, "-d", files["data"], "-o", str(report), "--figure", str(figure))
    assert {s["name"] for s in json.loads(report.read_text())} == {"first", "second", NO_PROMPT}
    run(*common, "--target", f"{files['prompts']}/first", "-o", str(report))
    (only,) = json.loads(report.read_text())
    assert only["name"] == "second" and only["scores"] is None and abs(only["mean_cosine"]) < 1
    with pytest.raises(ValueError, match=r"must end with \.svg"):
        run(*common, "-d", files["data"], "--figure", str(tmp_path / "s.txt"))
