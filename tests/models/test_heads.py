"""Every head gives each row what the row gives alone, without padding: values, loss and gradients."""

from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.nn.functional as F
import transformers as tf
from support.rows_alone import PROMPTS, ROWS, alone, relative, tuned_model
from support.tiny_models import BART, BERT, GPT2, LLAMA, T5, batch, build
from torch import Tensor

import softprompt_fast as spf

SMALLEST = torch.finfo(torch.float32).min
CLASSIFIERS = ["llama", "gpt2", "opt", "bloom", "qwen3", "gemma3", "mpt", "bert", "roberta", "electra", "modernbert"]
TAGGERS = ["llama", "gpt2", "bloom", "bert", "roberta", "electra", "modernbert"]
READERS = ["llama", "gpt2", "opt", "bloom", "bert", "roberta", "electra"]
HEADS = [
    *((name, "SequenceClassification") for name in CLASSIFIERS),
    *((name, "TokenClassification") for name in TAGGERS),
    *((name, "QuestionAnswering") for name in READERS),
]
PADDINGS = ["left", "right", "mixed", "holes"]


def rows(padding: str) -> tuple[Tensor, Tensor]:
    torch.manual_seed(1)
    if padding != "holes":
        return batch(padding=padding)
    ids, mask = batch(padding="right")
    mask[:, 1::4] = 0
    return ids, mask


def targets(head: str, ids: Tensor, mask: Tensor) -> dict[str, Tensor]:
    """Labels of a batch; those of tokens also at padding, where they must not count."""
    if head == "SequenceClassification":
        return {"labels": torch.tensor([0, 1, 1, 0])}
    if head == "TokenClassification":
        return {"labels": torch.where(ids % 3 == 0, -100, ids % 2)}
    places = [row.nonzero().flatten() for row in mask]
    return {
        "start_positions": torch.stack([columns[1] for columns in places]),
        "end_positions": torch.stack([columns[-1] for columns in places]),
    }


def losses_alone(head: str, output: Any, skipped: int, real: Tensor, target: dict[str, Tensor], row: int) -> Tensor:
    """The summed loss of one row, from the logits it has alone."""
    if head == "SequenceClassification":
        return F.cross_entropy(output.logits, target["labels"][row : row + 1], reduction="sum")
    if head == "TokenClassification":
        return F.cross_entropy(output.logits[0, skipped:], target["labels"][row][real], reduction="sum")
    columns = real.cumsum(0) - 1 + skipped
    ends = (("start_logits", "start_positions"), ("end_logits", "end_positions"))
    return sum(F.cross_entropy(output[name], columns[target[key][row]][None]) / 2 for name, key in ends)


SHARED = ["llama", "qwen3", "gemma3", "gpt2"]
"""Decoders whose heads run after shared prompts."""
LAYOUTS = [
    *((*one, "padded") for one in HEADS),
    *((name, head, "shared") for name, head in HEADS if name in SHARED),
]


def tuned_head(name: str, head: str, execution: str) -> spf.SoftPromptModel:
    # ModernBERT's logits are small differences of large numbers.
    model = build(name, head=head, dtype=torch.float64 if name == "modernbert" else torch.float32)
    tuned = spf.SoftPromptModel(model, execution=execution)
    for prompt, length in PROMPTS.items():
        tuned.add_prompt(prompt, init=torch.randn(length, tuned.prompts.embedding_dim) * 0.5)
    return tuned


@pytest.mark.parametrize("padding", PADDINGS)
@pytest.mark.parametrize(("name", "head", "execution"), LAYOUTS)
def test_a_head_gives_each_row_what_it_gives_alone(name: str, head: str, execution: str, padding: str) -> None:
    tuned = tuned_head(name, head, execution)
    trained = [p for key, p in tuned.base_model.named_parameters() if head_of(tuned) in key]
    for parameter in trained:
        parameter.requires_grad_(True)
    ids, mask = rows(padding)
    target = targets(head, ids, mask)
    output = tuned(ids, mask, prompt_ids=ROWS, **target)
    assert tuned.execution_report().execution == execution
    total, used = torch.zeros(()), []
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        expected, vectors = alone(tuned, ids[row][real], prompt)
        skipped = len(vectors)
        used.append((prompt, vectors))
        if head == "SequenceClassification":
            assert relative(output.logits[row], expected.logits[0]) < 1e-5
        elif head == "TokenClassification":
            assert output.logits.shape[:2] == ids.shape
            assert relative(output.logits[row][real], expected.logits[0, skipped:]) < 1e-5
            assert not output.logits[row][~real].any()
        else:
            for end in ("start_logits", "end_logits"):
                assert output[end].shape == ids.shape
                assert relative(output[end][row][real], expected[end][0, skipped:]) < 1e-5
                assert (output[end][row][~real] == SMALLEST).all()
        total = total + losses_alone(head, expected, skipped, real, target, row)
    counted = int((target["labels"][mask.bool()] != -100).sum()) if head == "TokenClassification" else len(ROWS)
    loss = total / counted
    assert relative(output.loss, loss) < 1e-5

    output.loss.backward()
    got = torch.cat([parameter.grad.flatten() for parameter in trained])
    for parameter in trained:
        parameter.grad = None
    loss.backward()
    assert relative(got, torch.cat([parameter.grad.flatten() for parameter in trained])) < 1e-5
    for prompt in PROMPTS:
        expected_grad = sum(vectors.grad for name_, vectors in used if name_ == prompt)
        assert relative(tuned.prompts[prompt].grad, expected_grad) < 1e-5


def head_of(tuned: spf.SoftPromptModel) -> str:
    names = [name for name, _ in tuned.base_model.named_children()]
    return next(name for name in ("score", "classifier", "qa_outputs") if name in names)


@pytest.mark.parametrize("execution", ["padded", "shared"])
@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_rows_that_begin_with_the_same_text(head: str, execution: str) -> None:
    """Shared text runs once: its tokens still have their own outputs in every row."""
    tuned = tuned_head("llama", head, execution)
    ids, mask = rows("right")
    ids[:, :4] = ids[0, :4]
    target = targets(head, ids, mask)
    output = tuned(ids, mask, prompt_ids="long", output_hidden_states=True, **target)
    apart = [
        tuned(i[None], m[None], prompt_ids="long", output_hidden_states=True) for i, m in zip(ids, mask, strict=True)
    ]
    for name in output.keys() - {"loss", "hidden_states"}:
        assert relative(output[name], torch.cat([one[name] for one in apart])) < 1e-5
    assert relative(output.hidden_states[-1], torch.cat([one.hidden_states[-1] for one in apart])) < 1e-5
    if "labels" in target:
        with pytest.raises(ValueError, match="`loss_function` cannot be given"):
            tuned(ids, mask, labels=target["labels"], prompt_ids="long", loss_function=lambda *_: ids.sum())


@pytest.mark.parametrize("head", ["SequenceClassification", "TokenClassification", "QuestionAnswering"])
def test_a_wrong_layout_of_a_head_is_found_by_the_first_batch(head: str, caplog: pytest.LogCaptureFixture) -> None:
    tuned = tuned_head("llama", head, "auto")
    attention = getattr(tuned.base_model, tuned.base_model.base_model_prefix).layers[0].self_attn
    forward = attention.forward

    def noisy(hidden_states: Tensor, *args: Any, **options: Any) -> Any:
        return forward(hidden_states.roll(1, 1), *args, **options)

    attention.forward = noisy
    ids, mask = rows("left")
    tuned(ids, mask, prompt_ids=ROWS)
    assert tuned.execution_report().execution == "padded"
    assert "differ from row-by-row" in caplog.text


def test_a_classifier_of_another_form_runs_padded() -> None:
    model = build("llama", head="SequenceClassification")
    model.other, model.score = model.score, None
    assert "`score`" in spf.SoftPromptModel(model).execution_report().reason


@pytest.mark.parametrize("name", ["bert", "roberta"])
def test_an_encoder_pools_its_first_position_which_is_the_prompts_first_vector(name: str) -> None:
    tuned = tuned_model(name, head="SequenceClassification")
    ids, mask = rows("left")
    together = tuned(ids, mask, prompt_ids=ROWS, output_hidden_states=True)
    model, row = tuned.base_model, mask[0].bool()
    joined = torch.cat([tuned.prompts["long"], tuned.get_input_embeddings()(ids[0][row])])[None]
    states = model.base_model(inputs_embeds=joined).last_hidden_state
    pooled = model.bert.pooler(states) if name == "bert" else states
    assert relative(together.logits[0], model.classifier(pooled)[0]) < 1e-5


@pytest.mark.parametrize("name", ["llama", "bert"])
def test_several_labels_and_regression(name: str) -> None:
    tuned = tuned_model(name, head="SequenceClassification")
    ids, mask = rows("mixed")
    wanted = torch.tensor([[0.0, 1.0], [1.0, 1.0], [1.0, 0.0], [0.0, 0.0]])
    output = tuned(ids, mask, prompt_ids=ROWS, labels=wanted)
    assert relative(output.loss, F.binary_cross_entropy_with_logits(output.logits, wanted)) < 1e-6


def test_a_decoder_without_a_padding_token_classifies_batches() -> None:
    tuned = tuned_model("llama", head="SequenceClassification")
    ids, mask = rows("right")
    expected = tuned(ids, mask, prompt_ids=ROWS).logits
    tuned.config.pad_token_id = None
    assert torch.equal(tuned(ids, mask, prompt_ids=ROWS).logits, expected)
    assert tuned.config.pad_token_id is None


@pytest.mark.parametrize("name", ["bert", "llama"])
def test_answers_at_padding_or_outside_are_ignored_and_a_loss_needs_both_ends(name: str) -> None:
    tuned = tuned_model(name, head="QuestionAnswering")
    ids, mask = rows("right")
    start, end = torch.tensor([1, 10, 2, 99]), torch.tensor([3, 2, 4, 3])
    start_too = start.where(start != 99, -100)
    assert not mask[1, 10]
    output = tuned(ids, mask, prompt_ids=[None] * 4, start_positions=start, end_positions=end)
    first = F.cross_entropy(output.start_logits[[0, 2]], start[[0, 2]])
    assert relative(output.loss, (first + F.cross_entropy(output.end_logits, end)) / 2) < 1e-6
    again = tuned(ids, mask, prompt_ids=[None] * 4, start_positions=start_too, end_positions=end)
    assert torch.equal(again.loss, output.loss)
    assert output[0] is output.loss
    with pytest.raises(ValueError, match="must be given together, got `start_positions` alone"):
        tuned(ids, mask, prompt_ids=ROWS, start_positions=start)
    with pytest.raises(ValueError, match="`end_positions` must have shape"):
        tuned(ids, mask, prompt_ids=ROWS, start_positions=start, end_positions=end[:2])
    with pytest.raises(TypeError, match="`end_positions` must be a tensor"):
        tuned(ids, mask, prompt_ids=ROWS, start_positions=start, end_positions=[1, 2, 3, 4])
    with pytest.raises(ValueError, match="`labels` cannot be given for question answering"):
        tuned(ids, mask, prompt_ids=ROWS, labels=ids)


def test_token_types_move_with_their_tokens() -> None:
    tuned = tuned_model("bert", head="QuestionAnswering")
    ids, mask = rows("left")
    types = (torch.arange(ids.shape[1]) > 5).long().expand_as(ids)
    output = tuned(ids, mask, prompt_ids=ROWS, token_type_ids=types)
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        length = 0 if prompt is None else PROMPTS[prompt]
        own = F.pad(types[row][real], (length, 0))[None]
        expected, _ = alone(tuned, ids[row][real], prompt, token_type_ids=own)
        assert relative(output.start_logits[row][real], expected.start_logits[0, length:]) < 1e-5


@pytest.mark.parametrize("kind", ["Llama", "GPT2", "Bert", "ModernBert"])
@pytest.mark.parametrize("padding", PADDINGS)
def test_features_are_those_of_the_text(kind: str, padding: str) -> None:
    sizes = {"Llama": LLAMA, "GPT2": GPT2}.get(kind, BERT)
    torch.manual_seed(0)
    tuned = spf.SoftPromptModel(getattr(tf, f"{kind}Model")(getattr(tf, f"{kind}Config")(**sizes)).eval())
    for prompt, length in PROMPTS.items():
        tuned.add_prompt(prompt, init=torch.randn(length, 32) * 0.5)
    ids, mask = rows(padding)
    states = tuned(ids, mask, prompt_ids=ROWS).last_hidden_state
    pooled = {how: spf.pooled_text(states, mask, how) for how in ("mean", "first", "last")}
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        output, vectors = alone(tuned, ids[row][real], prompt)
        expected = output.last_hidden_state[0, len(vectors) :]
        assert relative(states[row][real], expected) < 1e-5
        assert relative(pooled["mean"][row], expected.mean(0)) < 1e-5
        assert relative(pooled["first"][row], expected[0]) < 1e-5
        assert relative(pooled["last"][row], expected[-1]) < 1e-5


def test_pooling_of_texts() -> None:
    states = torch.arange(12.0).view(2, 3, 2)
    mask = torch.tensor([[1, 1, 0], [0, 0, 0]])
    states[0, 2] = float("nan")  # padding of another source is not zero
    assert torch.equal(spf.pooled_text(states, mask), torch.tensor([[1.0, 2.0], [0.0, 0.0]]))
    assert torch.equal(spf.pooled_text(states[1:], how="last"), states[1:, 2])
    with pytest.raises(ValueError, match="`how` must be mean, first or last, got 'max'"):
        spf.pooled_text(states, mask, "max")
    with pytest.raises(ValueError, match=r"`states` must have shape \[B, T, D\], got \[3, 2\]"):
        spf.pooled_text(states[0], mask)
    with pytest.raises(ValueError, match=r"`attention_mask` must have shape \[2, 3\], got \[2\]"):
        spf.pooled_text(states, mask[:, 0])


REFUSED: dict[str, tuple[Any, str]] = {
    "BertForMultipleChoice": (tf.BertConfig(**BERT), "reads or pools positions that a prompt would displace"),
    "BertForNextSentencePrediction": (tf.BertConfig(**BERT), "reads or pools positions that a prompt would displace"),
    "BertForPreTraining": (tf.BertConfig(**BERT), "reads or pools positions that a prompt would displace"),
    "BartForSequenceClassification": (tf.BartConfig(**BART), "gives its decoder the token ids of its input"),
    "BartForQuestionAnswering": (tf.BartConfig(**BART), "gives its decoder the token ids of its input"),
    "XLNetForQuestionAnswering": (
        tf.XLNetConfig(vocab_size=96, d_model=32, n_layer=2, n_head=4, d_inner=48),
        "reads or pools positions that a prompt would displace",
    ),
    "SplinterForQuestionAnswering": (
        tf.SplinterConfig(**BERT),
        "reads or pools positions that a prompt would displace",
    ),
    "CanineForSequenceClassification": (
        tf.CanineConfig(**{k: v for k, v in BERT.items() if k != "vocab_size"}),
        "has no table of token embeddings",
    ),
    "T5ForSequenceClassification": (tf.T5Config(**T5), "gives its decoder the token ids of its input"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_heads_that_cannot_have_a_prompt_say_why(name: str) -> None:
    config, reason = REFUSED[name]
    with pytest.raises(TypeError, match=f"{name} {reason}"):
        spf.SoftPromptModel(getattr(tf, name)(config).eval())


def test_the_encoder_of_an_encoder_decoder_tags_tokens() -> None:
    torch.manual_seed(0)
    model = tf.T5ForTokenClassification(tf.T5Config(**T5)).eval()
    tuned = spf.SoftPromptModel(model)
    tuned.add_prompt("short", init=torch.randn(2, 32) * 0.5)
    ids, mask = rows("left")
    output = tuned(ids, mask, labels=ids % 2)
    for row in range(len(ids)):
        real = mask[row].bool()
        expected, _ = alone(tuned, ids[row][real], "short")
        assert relative(output.logits[row][real], expected.logits[0, 2:]) < 1e-5
    assert relative(output.loss, F.cross_entropy(output.logits[mask.bool()], (ids % 2)[mask.bool()])) < 1e-5


def test_only_language_models_predict_a_next_token_and_share_their_loss_between_steps() -> None:
    ids, mask = rows("right")
    for head in ("SequenceClassification", "TokenClassification", "QuestionAnswering"):
        tuned = tuned_model("llama", head=head)
        assert tuned._get_name() == "SoftPromptModel"  # Trainer's label smoothing shifts labels of "LlamaForCausalLM"
        assert not tuned.accepts_loss_kwargs  # these heads do not read num_items_in_batch
        with pytest.raises(TypeError, match="does not predict the next token"):
            tuned.next_token_logits(ids, mask, ROWS)
    assert tuned_model("llama").accepts_loss_kwargs
