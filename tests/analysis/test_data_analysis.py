"""Analysis of data before tuning: repeats, lengths, baselines, warnings, the recipe."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
from support.analysis_cases import TASKS, sane, tuned_on
from support.tiny_reviews import BAD, GOOD, reviews, tiny_tokenizer

from softprompt_fast.analysis.data_analysis import analyze
from softprompt_fast.analysis.duplicates import find_duplicates, normalise
from softprompt_fast.analysis.figures import analysis_figure
from softprompt_fast.analysis.results import Analysis
from softprompt_fast.base.figures import save_figure
from softprompt_fast.evaluation.predictions import evaluate
from softprompt_fast.tasks.task import Task, classification_task


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
    duplicates = find_duplicates(TASKS["one-token"], rows, held_out)
    assert (duplicates.exact, duplicates.near, duplicates.conflicts) == (1, 1, 3)
    assert (duplicates.leaks_exact, duplicates.leaks_near) == (1, 1)
    assert duplicates.conflict_examples == ["fine film"] and duplicates.leak_examples == ["dull film", "DULL film"]
    assert find_duplicates(TASKS["generation"], rows, []).conflicts == 0


def test_lengths_and_limits_are_those_of_the_encoded_texts() -> None:
    rows = reviews(64)
    task = classification_task(rows, max_length=6)
    analysis = analysed(rows, task=task, sample=0)
    lengths = [len(tiny_tokenizer()(task.text(row)).input_ids) for row in rows]
    assert analysis.text.tokens == lengths and analysis.text.quantiles["max"] == max(lengths) == 8
    assert analysis.cut_by_max_length == sum(n > 6 for n in lengths) / 64 > 0
    assert analysis.context == 128 and analysis.over_context == 0.0 and analysis.target.quantiles["max"] == 1
    assert analysis.zero_shot is None
    assert analysis.recipe.choices["max_length"].value == 8
    assert any("lose their beginning; 8 is suggested" in warning for warning in analysis.recipe.warnings)
    long = [row | {"text": "very " * 130} for row in rows]
    analysis = analysed(long, sample=0)
    assert analysis.over_context == 1.0 and analysis.recipe.choices["max_length"].value == 128 - 10 - 1
    assert "the context of 128 less the prompt" in analysis.recipe.choices["max_length"].reason


def test_baselines_are_what_evaluate_and_counting_give() -> None:
    rows, held_out = reviews(64)[:33], reviews(64)[33:]
    rows += [row for row in rows if row["label"] == "no"]
    analysis = analysed(rows, held_out)
    bare = evaluate(tuned_on(), tiny_tokenizer(), TASKS["one-token"], held_out)
    assert analysis.zero_shot is not None and analysis.majority is not None
    for key in ("accuracy", "accuracy_low", "accuracy_high", "loss"):
        assert analysis.zero_shot[key] == pytest.approx(bare[key], abs=1e-5)
    share = sum(row["label"] == "no" for row in held_out) / len(held_out)
    assert (analysis.majority["label"], analysis.majority["accuracy"]) == ("no", share)
    assert sum(analysis.zero_shot_answers.values()) == len(held_out)
    assert analysed(rows, held_out, sample=7).zero_shot["rows"] == 7  # type: ignore[index]


def test_warnings_name_what_is_wrong_and_nothing_else() -> None:
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
        "training rows have a text that also has another label",
        "training rows repeat an earlier text",
    ):
        assert expected in said, (expected, said)


def test_label_words_of_several_tokens_and_clashes() -> None:
    task = Task("classification", "{text}", "label", {"yes": " very fine", "no": " very dull"})
    analysis = analysed(reviews(), task=task, sample=0)
    assert [len(word.ids) for word in analysis.label_words.values()] == [2, 2]
    assert analysis.label_words["yes"].tokens == ["very", "fine"] and analysis.first_token_clashes == [["yes", "no"]]
    said = "\n".join(analysis.recipe.warnings)
    assert "multi-token label words ('yes' 2, 'no' 2)" in said and "begin with the same token" in said
    assert "scored whole" in analysis.recipe.choices["label_words"].reason
    # "Yes" is unknown to the tokenizer, "yes" is one token.
    shouted = Task("classification", "{text}", "label", {"yes": " YES :", "no": " no"})
    assert "scored whole" in analysed(reviews(), task=shouted, sample=0).recipe.choices["label_words"].reason
    spelt = Task("classification", "{text}", "label", {"yes": " Great", "no": " GREAT"})
    analysis = analysed(reviews(), task=spelt, sample=0)
    assert analysis.first_token_clashes == [["yes", "no"]]  # both are the unknown token


def test_labels_of_held_out_rows_alone_and_rows_that_cannot_be_read() -> None:
    rows = [*reviews(), {"text": ["film"], "label": "yes"}, {"text": "bad \ud83d", "label": "yes"}]
    held_out = [*reviews(9), {"text": "film", "label": "perhaps"}, {"text": {"a": 1}, "label": "no"}]
    analysis = analysed(rows, held_out, sample=0)
    assert analysis.held_out_labels == ["perhaps"] and analysis.empty_rows == 2
    said = "\n".join(analysis.recipe.warnings)
    assert "no training row has the labels ['perhaps'] of held-out rows" in said
    assert "2 of 66 training rows have no text or no readable one" in said


def test_responses_that_are_cut_are_reported() -> None:
    rows = [{"text": "film", "label": "very " * (i % 4)} for i in range(1, 9)]
    task = Task("generation", "{text}", "label", max_length=3)
    analysis = analysed(rows, task=task, sample=0)
    assert analysis.cut_responses == 1 / 3
    assert any("33.33% of the responses are longer than max_length=3" in w for w in analysis.recipe.warnings)
    assert analysed(rows, task=Task("generation", "{text}", "label"), sample=0).cut_responses == 0


def test_generation_tasks_have_lengths_and_no_classes(tmp_path: Path) -> None:
    rows = [{"text": row["text"], "label": "very fine film"} for row in reviews()]
    analysis = analysed(rows, rows[:9], task=TASKS["generation"])
    assert analysis.target.quantiles["max"] == 4 and analysis.classes == {} and analysis.majority is None
    assert analysis.zero_shot is not None and analysis.zero_shot["loss_low"] < analysis.zero_shot["loss"]
    assert "label_words" not in analysis.recipe.choices and analysis.recipe.choices["init"].value == "vocabulary"
    assert sane(analysis.to_json())["zero_shot"]["perplexity"] > 1
    save_figure(analysis_figure(analysis), tmp_path / "a.svg")


@pytest.mark.parametrize(
    "rows",
    [
        [{"text": "film", "label": None}],
        [{"text": "", "label": "yes"}],
        [{"text": "film", "label": "yes"}],
    ],
)
def test_data_with_almost_nothing_in_it_is_analysed_too(rows: list[dict[str, Any]], tmp_path: Path) -> None:
    analysis = analysed(rows)
    assert any("too few rows" in warning for warning in analysis.recipe.warnings)
    assert "tokens" not in sane(analysis.to_json())["text"]
    save_figure(analysis_figure(analysis), tmp_path / "a.png")


def test_encoder_decoders_are_analysed() -> None:
    analysis = analyze(tuned_on("t5"), tiny_tokenizer(), TASKS["one-token"], reviews(), reviews(8))
    assert analysis.context is None and analysis.zero_shot is not None and analysis.target.quantiles["max"] == 2
