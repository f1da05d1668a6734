"""The branches of label words, and the scores that all ways to classify compute from them."""

from __future__ import annotations

import itertools

import pytest
import torch
from support.tiny_models import build
from support.tiny_reviews import tiny_tokenizer

from softprompt_fast.evaluation.likelihood import ModelBackend, label_log_probabilities
from softprompt_fast.evaluation.predictions import evaluate, predict
from softprompt_fast.evaluation.prompt_scoring import score_prompts
from softprompt_fast.inference.pipeline import SoftPromptPipeline
from softprompt_fast.inference.prompt_bank import PromptBank
from softprompt_fast.models.soft_prompt_model import SoftPromptModel
from softprompt_fast.tasks.label_tree import LabelTree
from softprompt_fast.tasks.task import Task

END = 2
WORDS = {
    "one token each": [[7], [5], [9]],
    "one begins another": [[9, 3, END], [9, 3, 4, END], [9, 3, 4, 4, END], [9, 5, END]],
    "nothing in common": [[9, 3], [4, 3, 3], [5]],
    "two paths": [[9, 3], [9, 4], [5, 3], [5, 4, 4]],
}
TASK = Task(
    "classification",
    "{text} Label:",
    "label",
    {"a": " yes", "b": " yes very", "c": " yes very very", "d": " no film", "e": " plot"},
    prompt="p",
)
ROWS = [{"text": f"film {word}", "label": label} for word, label in zip(("dull", "fine", "poor"), "abd", strict=True)]


def tuned(architecture: str) -> SoftPromptModel:
    model = SoftPromptModel(build(architecture))
    model.add_prompt(
        "p", init=2 * torch.randn(3, model.prompts.embedding_dim, generator=torch.Generator().manual_seed(0))
    )
    return model


def test_branches_and_what_must_be_read_for_them() -> None:
    numbers = [[8, n, END] for n in range(10, 19)] + [[8, 10, n, END] for n in range(10, 14)]
    tree = LabelTree(numbers)
    assert tree.branches == {(8,): list(range(10, 19)), (8, 10): [END, 10, 11, 12, 13]}
    assert tree.paths == [(8, 10)] and tree.branches_on((8, 10)) == [(8,), (8, 10)]
    assert LabelTree(WORDS["one token each"]).paths == LabelTree(WORDS["nothing in common"]).paths == [()]
    tree = LabelTree(WORDS["two paths"])
    assert tree.paths == [(9,), (5,)] and [tree.branches_on(path) for path in tree.paths] == [[(), (9,)], [(5,)]]


@pytest.mark.parametrize("words", WORDS)
@pytest.mark.parametrize("architecture", ["llama", "bloom", "t5"])
def test_a_labels_probability_is_the_product_over_its_branches(architecture: str, words: str) -> None:
    backend = ModelBackend(tuned(architecture), "p")
    texts, ids = [[4, 10, 7], [5], [6, 6, 8, 9, 11]], WORDS[words]
    got = label_log_probabilities(backend, texts, ids)
    assert torch.allclose(got.exp().sum(-1), torch.ones(3, dtype=torch.float64))
    for row, text in enumerate(texts):
        for label, word in enumerate(ids):
            expected = torch.zeros((), dtype=torch.float64)
            for step, token in enumerate(word):
                among = list(dict.fromkeys(w[step] for w in ids if w[:step] == word[:step] and len(w) > step))
                logits = backend.target_logits([text], [[*word[:step], 0]])[-1].double()
                expected += logits[among].log_softmax(-1)[among.index(token)]
            assert torch.allclose(got[row, label], expected, atol=1e-5)


def test_labels_of_one_token_have_the_same_bits_as_their_logits_give() -> None:
    backend = ModelBackend(tuned("llama"), "p")
    texts, words = [[4, 10, 7], [5]], WORDS["one token each"]
    expected = backend.next_logits(texts)[:, [word[0] for word in words]].double().log_softmax(-1)
    assert torch.equal(label_log_probabilities(backend, texts, words), expected)


@pytest.mark.parametrize("architecture", ["llama", "bloom", "t5"])
def test_all_ways_to_classify_give_the_same_scores(architecture: str) -> None:
    model, tokenizer = tuned(architecture), tiny_tokenizer()
    predicted = predict(model, tokenizer, TASK, ROWS)
    bank = PromptBank(model.base_model)
    for name in ("p", "q"):
        bank.add(name, model.prompts["p"].detach(), task=TASK)
    pipe = SoftPromptPipeline(bank, tokenizer, max_batch_rows=2)
    answers = pipe.classify(ROWS, "p")
    together = pipe.classify(ROWS, ensemble=["p", "q"])
    for one, other, both in zip(predicted, answers, together, strict=True):
        assert other["scores"] == pytest.approx(one["scores"], abs=1e-5)
        assert both["scores"] == pytest.approx(one["scores"], abs=1e-5) and both["agreement"] == 1.0
    scores = evaluate(model, tokenizer, TASK, ROWS)
    prompts = {"p": model.prompts["p"].detach()}
    assert score_prompts(model, tokenizer, TASK, ROWS, prompts)["p"].loss == pytest.approx(scores["loss"], abs=1e-5)
    told = pipe.classify([f"{row['text']} Label:" for row in ROWS], labels=TASK.label_words)
    plain = pipe.classify([f"{row['text']} Label:" for row in ROWS], labels=list(TASK.label_words.values()))
    for one, other in itertools.pairwise([told[0]["scores"].values(), plain[0]["scores"].values()]):
        assert list(one) == pytest.approx(list(other))


def test_labels_must_differ() -> None:
    pipe = SoftPromptPipeline(tuned("llama").base_model, tiny_tokenizer())
    (answer,) = pipe.classify(["film"], labels={"a": " yes", "b": " yes"})
    assert "different tokens" in answer["error"]
