"""FastSoftPrompt: the bank, its use in a loop, initialisation, saving."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from support.tiny_models import batch, build

import softprompt_fast as spf
from softprompt_fast.hf.embedding import embedding_table

WIDTH = 32


@pytest.fixture
def bank() -> spf.FastSoftPrompt:
    return spf.FastSoftPrompt(WIDTH, {"movies": 3, "tweets": 5})


@pytest.fixture
def embedding() -> torch.nn.Embedding:
    return torch.nn.Embedding(96, WIDTH)


@pytest.mark.parametrize(
    "prompt_ids",
    [
        ["tweets", "movies", None, "tweets"],
        [1, 0, -1, 1],
        torch.tensor([1, 0, -1, 1]),
        torch.tensor([1, 0, -1, 1], dtype=torch.int32),
    ],
)
def test_prompt_ids_by_name_position_and_tensor(
    bank: spf.FastSoftPrompt, embedding: torch.nn.Embedding, prompt_ids: Any
) -> None:
    ids, mask = batch()
    made = bank(ids, mask, embedding=embedding, prompt_ids=prompt_ids)
    assert made.inputs_embeds.shape == (4, 5 + ids.shape[1], WIDTH)
    assert torch.equal(made.inputs_embeds[0, :5], bank["tweets"])
    assert torch.equal(made.inputs_embeds[1, :3], bank["movies"])
    assert torch.equal(made.inputs_embeds[2, : mask[2].sum()], embedding(ids[2][mask[2].bool()]))


def test_one_name_for_all_rows_and_none_for_a_single_prompt(embedding: torch.nn.Embedding) -> None:
    bank = spf.FastSoftPrompt(WIDTH, {"only": 4})
    ids, _ = batch()
    by_name = bank(ids, embedding=embedding, prompt_ids="only")
    assert torch.equal(by_name.inputs_embeds, bank(ids, embedding=embedding).inputs_embeds)


def test_a_transformers_model_takes_the_batch() -> None:
    model = build("llama")
    bank = spf.FastSoftPrompt(WIDTH, {"a": 3})
    ids, mask = batch()
    for side in ("left", "right"):
        made = bank(ids, mask, embedding=model.get_input_embeddings(), labels=ids, padding_side=side)
        output = model(**made)
        assert output.logits.shape[:2] == made.inputs_embeds.shape[:2]
        output.loss.backward()
    assert bank["a"].grad is not None and bank["a"].grad.abs().sum() > 0


def test_only_used_and_unfrozen_prompts_get_a_gradient(bank: spf.FastSoftPrompt, embedding: torch.nn.Embedding) -> None:
    embedding.requires_grad_(False)
    bank.add_prompt("third", init=torch.randn(2, WIDTH))
    bank.freeze_prompt("movies")
    ids, _ = batch()
    made = bank(ids, embedding=embedding, prompt_ids=["movies", "tweets", "tweets", None])
    made.inputs_embeds.sum().backward()
    assert bank["movies"].grad is None and bank["third"].grad is None
    assert torch.equal(bank["tweets"].grad, torch.full((5, WIDTH), 2.0))
    bank.freeze_prompt("movies", False)
    assert bank["movies"].requires_grad


def test_rename_keeps_the_parameter_and_remove_forgets_it(bank: spf.FastSoftPrompt) -> None:
    parameter = bank["movies"]
    bank.rename_prompt("movies", "films")
    assert bank["films"] is parameter and bank.names == ["films", "tweets"]
    bank.remove_prompt("tweets")
    assert bank.names == ["films"] and len(list(bank.parameters())) == 1
    with pytest.raises(KeyError, match="no prompt 'tweets' in the bank, which has \\['films'\\]"):
        bank["tweets"]


def test_state_dict_round_trip_brings_the_prompts_along(bank: spf.FastSoftPrompt) -> None:
    other = spf.FastSoftPrompt(WIDTH, {"tweets": 9})
    other.load_state_dict(bank.state_dict())
    assert other.lengths == {"tweets": 5, "movies": 3}
    assert all(torch.equal(other[name], bank[name]) for name in bank)
    nested = torch.nn.ModuleDict({"bank": spf.FastSoftPrompt(WIDTH)})
    nested.load_state_dict(torch.nn.ModuleDict({"bank": bank}).state_dict())
    assert nested["bank"].lengths == bank.lengths
    with pytest.raises(ValueError, match="shape \\[P, 8\\]"):
        spf.FastSoftPrompt(8).load_state_dict(bank.state_dict())


def test_replicas_as_data_parallel_makes_them(bank: spf.FastSoftPrompt, embedding: torch.nn.Embedding) -> None:
    """nn.parallel.replicate gives a replica its tensors as plain attributes; they must be what forward reads."""
    replica = bank._replicate_for_data_parallel()
    for name, parameter in bank._parameters.items():
        setattr(replica, name, parameter.detach() * 2)
    ids, _ = batch()
    made = replica(ids, embedding=embedding, prompt_ids="movies")
    assert torch.equal(made.inputs_embeds[0, :3], bank["movies"] * 2)


def test_functional_call(bank: spf.FastSoftPrompt, embedding: torch.nn.Embedding) -> None:
    ids, _ = batch()
    doubled = {name: value * 2 for name, value in bank.named_parameters()}
    made = torch.func.functional_call(bank, doubled, (ids,), {"embedding": embedding, "prompt_ids": "tweets"})
    assert torch.equal(made.inputs_embeds[0, :5], bank["tweets"] * 2)


def test_compiled_without_graph_breaks(bank: spf.FastSoftPrompt, embedding: torch.nn.Embedding) -> None:
    def loss(ids: torch.Tensor, mask: torch.Tensor, prompt_ids: torch.Tensor) -> torch.Tensor:
        return bank(ids, mask, embedding=embedding, prompt_ids=prompt_ids).inputs_embeds.square().sum()

    compiled = torch.compile(loss, fullgraph=True, dynamic=True)
    for rows, tokens in ((4, 11), (3, 7)):
        ids, mask = batch(rows, tokens)
        prompt_ids = torch.arange(rows) % 2
        bank.zero_grad()
        compiled(ids, mask, prompt_ids).backward()
        got = [p.grad.clone() for p in bank.parameters()]
        bank.zero_grad()
        loss(ids, mask, prompt_ids).backward()
        assert all(torch.equal(a, p.grad) for a, p in zip(got, bank.parameters(), strict=True))


def test_scaled_embeddings_are_reproduced_and_others_refused() -> None:
    for name in ("gemma3", "bart-scaled"):
        module = build(name).get_input_embeddings()
        table = embedding_table(module)
        assert table.scale != 1.0
        ids = torch.arange(90)
        assert torch.equal(table(ids), module(ids))

    class Shifted(torch.nn.Embedding):
        def forward(self, ids: torch.Tensor) -> torch.Tensor:
            return super().forward(ids) + 1

    with pytest.raises(TypeError, match="Shifted is not"):
        embedding_table(Shifted(9, 4))
    with pytest.raises(TypeError, match="Linear"):
        embedding_table(torch.nn.Linear(3, 3))
    with pytest.raises(TypeError, match="max_norm"):
        embedding_table(torch.nn.Embedding(9, 4, max_norm=1.0))
    hooked = torch.nn.Embedding(9, 4)
    hooked.register_forward_hook(lambda *_: None)
    with pytest.raises(TypeError, match="hooks"):
        embedding_table(hooked)


class Words:
    """A tokenizer of one token per word."""

    def __call__(self, text: str, add_special_tokens: bool = True) -> Any:
        ids = [3 + sum(map(ord, word)) % 90 for word in text.split()]
        return type("Encoding", (), {"input_ids": ids})


def test_initialisation_from_text_repeats_or_cuts(embedding: torch.nn.Embedding) -> None:
    bank = spf.FastSoftPrompt(WIDTH)
    ids = torch.tensor(Words()("is this good").input_ids)
    bank.add_prompt("exact", init="text", init_text="is this good", embedding=embedding, tokenizer=Words())
    assert torch.equal(bank["exact"], embedding(ids))
    bank.add_prompt("five", 5, init="text", init_text="is this good", embedding=embedding, tokenizer=Words())
    assert torch.equal(bank["five"], embedding(ids)[[0, 1, 2, 0, 1]])


def test_initialisation_from_class_labels_averages_words(embedding: torch.nn.Embedding) -> None:
    bank = spf.FastSoftPrompt(WIDTH)
    labels = ["very good", "bad"]
    bank.add_prompt("a", 4, init="class_labels", class_labels=labels, embedding=embedding, tokenizer=Words(), seed=1)
    assert torch.allclose(bank["a"][0], embedding(torch.tensor(Words()("very good").input_ids)).mean(0))
    assert all((row == embedding.weight).all(1).any() for row in bank["a"][1:])


def test_initialisation_random_and_vocabulary_follow_the_embedding(embedding: torch.nn.Embedding) -> None:
    with torch.no_grad():
        embedding.weight.mul_(0.3)
    bank = spf.FastSoftPrompt(WIDTH)
    random = bank.add_prompt("random", 200, init="random", embedding=embedding, seed=1)
    assert (random.std() / embedding.weight.std()).item() == pytest.approx(1.0, rel=0.05)
    drawn = bank.add_prompt("drawn", 50, init="vocabulary", embedding=embedding, seed=1)
    matches = (drawn[:, None] == embedding.weight[None]).all(-1)
    assert matches.any(1).all() and matches.any(0).sum() == 50
    again = bank.add_prompt("again", 50, init="vocabulary", embedding=embedding, seed=1)
    assert torch.equal(again, drawn) and again is not drawn
    copy = bank.add_prompt("copy", init="drawn")
    assert torch.equal(copy, drawn) and copy.data_ptr() != drawn.data_ptr()


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"name": "a/b"}, ValueError, "`name` must be .* got 'a/b'"),
        ({"name": "movies"}, ValueError, "has a prompt 'movies'"),
        ({"num_virtual_tokens": 0}, ValueError, "`num_virtual_tokens` must be a positive integer, got 0"),
        ({"num_virtual_tokens": 3}, ValueError, "`embedding` must be given for init='random'"),
        ({"init": "nonsense"}, ValueError, "`init` must be .* got 'nonsense'"),
        ({"init": torch.zeros(3)}, ValueError, r"float tensor \[P, D\]"),
        ({"init": torch.zeros(3, 7)}, ValueError, r"shape \[P, 32\], got \[3, 7\]"),
        ({"init": torch.full((2, WIDTH), float("nan"))}, ValueError, "finite"),
        ({"init": torch.zeros(2, WIDTH), "num_virtual_tokens": 5}, ValueError, "must be 2"),
        ({"init": "text", "embedding": torch.zeros(9, WIDTH)}, ValueError, "`tokenizer` must be given"),
        (
            {"init": "text", "embedding": torch.zeros(9, WIDTH), "tokenizer": Words(), "init_text": ""},
            ValueError,
            "`init_text` must hold text",
        ),
        (
            {"init": "class_labels", "embedding": torch.zeros(9, WIDTH), "tokenizer": Words()},
            ValueError,
            "`class_labels` must name the labels",
        ),
        ({"init": "vocabulary", "embedding": torch.zeros(9, WIDTH)}, ValueError, "`num_virtual_tokens` must be given"),
        (
            {"init": "vocabulary", "embedding": torch.zeros(9, WIDTH), "num_virtual_tokens": 10},
            ValueError,
            "at most 9 .* got 10",
        ),
    ],
)
def test_bad_prompts_are_refused(
    bank: spf.FastSoftPrompt, arguments: dict[str, Any], error: type[Exception], message: str
) -> None:
    with pytest.raises(error, match=message):
        bank.add_prompt(**({"name": "new"} | arguments))
    assert bank.names == ["movies", "tweets"]


@pytest.mark.parametrize(
    ("prompt_ids", "error", "message"),
    [
        (None, ValueError, "has 2 prompts"),
        ("films", KeyError, "no prompt 'films'"),
        (["movies"], ValueError, "each of the 4 rows, got 1"),
        ([0, 1, 2, 0], IndexError, "got 2 for row 2"),
        (torch.tensor([0, 0, 0, -2]), IndexError, "got -2 for row 3"),
        (torch.tensor([0.0, 0, 0, 0]), ValueError, "integers"),
    ],
)
def test_bad_prompt_ids_are_refused(
    bank: spf.FastSoftPrompt, embedding: torch.nn.Embedding, prompt_ids: Any, error: type[Exception], message: str
) -> None:
    ids, mask = batch()
    with pytest.raises(error, match=message):
        bank(ids, mask, embedding=embedding, prompt_ids=prompt_ids)


def test_a_bank_of_given_tensors_passes_gradients_to_what_computed_them(embedding: torch.nn.Embedding) -> None:
    source = torch.randn(3, WIDTH, requires_grad=True)
    bank = spf.FastSoftPrompt.holding({"doubled": 2 * source}, WIDTH)
    ids, mask = batch()
    assert (bank.lengths, list(bank.parameters()), bank.state_dict()) == ({"doubled": 3}, [], {})
    bank(ids, mask, embedding=embedding)["inputs_embeds"].sum().backward()
    torch.testing.assert_close(source.grad, torch.full_like(source, 2.0 * len(ids)))
