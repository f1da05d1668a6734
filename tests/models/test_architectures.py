"""Every architecture: a padded batch of mixed prompts gives each row what the row gives alone, without padding."""

from __future__ import annotations

import pytest
import torch
from support.rows_alone import PROMPTS, ROWS, alone, relative, tuned_model
from support.tiny_models import ALL, DECODERS, ENCODER_DECODERS, batch


@pytest.mark.parametrize("padding", ["left", "right", "mixed"])
@pytest.mark.parametrize("name", ALL)
def test_logits_equal_each_row_alone(name: str, padding: str) -> None:
    tuned = tuned_model(name)
    ids, mask = batch(padding=padding)
    decoder = {"decoder_input_ids": torch.randint(3, 90, (len(ids), 5))} if name in ENCODER_DECODERS else {}
    output = tuned(ids, mask, prompt_ids=ROWS, **decoder)
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        single = {key: value[row : row + 1] for key, value in decoder.items()}
        expected, used = alone(tuned, ids[row][real], prompt, **single)
        if name in ENCODER_DECODERS:
            assert relative(output.logits[row], expected.logits[0]) < 1e-5
            got = output.encoder_last_hidden_state[row][real]
            assert relative(got, expected.encoder_last_hidden_state[0, len(used) :]) < 1e-5
        else:
            assert relative(output.logits[row][real], expected.logits[0, len(used) :]) < 1e-5
            assert not output.logits[row][~real].any()


@pytest.mark.parametrize("name", ALL)
def test_loss_and_prompt_gradients_equal_each_row_alone(name: str) -> None:
    # The first releases of transformers 5 cannot run MPT in float64.
    tuned = tuned_model(name, dtype=torch.float32 if name == "mpt" else torch.float64)
    ids, mask = batch()
    if name in ENCODER_DECODERS:
        labels = torch.randint(3, 90, (len(ids), 5))
    else:
        labels = torch.where(torch.rand(ids.shape) < 0.6, ids, -100).masked_fill(mask == 0, 7)
    output = tuned(ids, mask, labels=labels, prompt_ids=ROWS)
    output.loss.backward()

    total, count = torch.zeros((), dtype=tuned.base_model.dtype), 0
    parts = []
    for row, prompt in enumerate(ROWS):
        real = mask[row].bool()
        if name in ENCODER_DECODERS:
            target = labels[row]
            expected, used = alone(tuned, ids[row][real], prompt, labels=labels[row : row + 1])
            logits = expected.logits[0]
        else:
            expected, used = alone(tuned, ids[row][real], prompt)
            target = torch.cat([torch.full((len(used),), -100), labels[row][real]])
            logits = expected.logits[0]
            if name in DECODERS:
                logits, target = logits[:-1], target[1:]
        total = total + torch.nn.functional.cross_entropy(logits, target, reduction="sum", ignore_index=-100)
        count += int((target != -100).sum())
        parts.append((prompt, used))
    loss = total / count
    loss.backward()
    assert relative(output.loss, loss) < 1e-6
    for prompt in PROMPTS:
        expected_grad = sum(used.grad for name_, used in parts if name_ == prompt and used.grad is not None)
        assert relative(tuned.prompts[prompt].grad, expected_grad) < 1e-5
    assert all(p.grad is None for p in tuned.base_model.parameters())


@pytest.mark.parametrize("name", [*DECODERS, *ENCODER_DECODERS])
def test_greedy_text_equals_each_row_alone(name: str) -> None:
    tuned = tuned_model(name)
    ids, mask = batch()
    options = {"max_new_tokens": 6, "min_new_tokens": 6, "do_sample": False}
    together = tuned.generate(ids, mask, ROWS, **options)
    for row, prompt in enumerate(ROWS):
        text = ids[row][mask[row].bool()]
        vectors = tuned.get_input_embeddings()(text[None])
        used = tuned.prompts[prompt][None] if prompt is not None else vectors[:, :0]
        expected = tuned.base_model.generate(inputs_embeds=torch.cat([used, vectors], 1), **options)[0]
        got = together[row] if name in ENCODER_DECODERS else together[row, ids.shape[1] :]
        assert torch.equal(got[-6:], expected[-6:]), (row, got, expected)
    if name in DECODERS:
        assert torch.equal(together[:, : ids.shape[1]], ids)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bert", "t5"])
def test_hidden_states_are_aligned_with_the_input(name: str) -> None:
    tuned = tuned_model(name)
    ids, mask = batch()
    extra = {"decoder_input_ids": ids[:, :3]} if name == "t5" else {}
    output = tuned(ids, mask, prompt_ids=ROWS, output_hidden_states=True, **extra)
    states = output.encoder_hidden_states if name == "t5" else output.hidden_states
    assert {tuple(s.shape) for s in states} == {(*ids.shape, tuned.prompts.embedding_dim)}
    real = mask[2].bool()
    expected, used = alone(
        tuned, ids[2][real], ROWS[2], output_hidden_states=True, **{k: v[2:3] for k, v in extra.items()}
    )
    wanted = expected.encoder_hidden_states if name == "t5" else expected.hidden_states
    assert relative(states[-1][2][real], wanted[-1][0, len(used) :]) < 1e-5


def test_sequence_classification_on_a_decoder_reads_the_last_real_token() -> None:
    tuned = tuned_model("llama", head="SequenceClassification")
    ids, mask = batch()
    output = tuned(ids, mask, labels=torch.tensor([0, 1, 1, 0]), prompt_ids=ROWS)
    for row, prompt in enumerate(ROWS):
        expected, _ = alone(tuned, ids[row][mask[row].bool()], prompt)
        assert relative(output.logits[row], expected.logits[0]) < 1e-5
    assert output.loss.isfinite()


def test_token_classification_labels_move_with_their_tokens() -> None:
    tuned = tuned_model("bert", head="TokenClassification")
    ids, mask = batch()
    output = tuned(ids, mask, labels=ids % 2, prompt_ids=ROWS)
    real = mask.bool()
    expected = torch.nn.functional.cross_entropy(output.logits[real], (ids % 2)[real])
    assert relative(output.loss, expected) < 1e-6


@pytest.mark.parametrize("name", ["llama", "t5", "bert"])
def test_a_row_without_prompt_is_the_model_itself(name: str) -> None:
    tuned = tuned_model(name)
    ids = torch.randint(3, 90, (2, 6))
    extra = {"decoder_input_ids": ids} if name == "t5" else {}
    bare = tuned.base_model(input_ids=ids, **extra).logits
    assert relative(tuned(ids, prompt_ids=[None, None], **extra).logits, bare) < 1e-6
