"""Products of float32 matrices that the user lets PyTorch round: prompts run as before, in the same layouts."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import pytest
import torch
import torch.nn.functional as F
from support.deep_rows_alone import deep_model
from support.rounded_products import precision_restored  # noqa: F401
from support.rows_alone import ROWS, relative, tuned_model
from support.tiny_models import batch, build

from softprompt_fast.hf.cuda_graphs import model_state
from softprompt_fast.packed.self_check import TOLERANCE, tolerance
from softprompt_fast.prompts.selection import Selection

pytestmark = pytest.mark.usefixtures("precision_restored")


def of_one_backend() -> None:
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"


def of_all() -> None:
    torch.set_float32_matmul_precision("medium")


@pytest.mark.parametrize("choose", [of_one_backend, of_all])
@pytest.mark.parametrize("make", [tuned_model, deep_model])
def test_prompts_keep_their_layout(make: Callable[[str], torch.nn.Module], choose: Callable[[], None]) -> None:
    torch.manual_seed(0)
    tuned = make("llama")
    wide = torch.nn.Linear(512, 512)  # large enough for rounded products
    ids, mask = batch()
    exact, product = tuned(ids, mask, prompt_ids=ROWS).logits, wide(torch.ones(64, 512))
    choose()
    rounds = not torch.equal(wide(torch.ones(64, 512)), product)
    again = make("llama")
    again.load_state_dict(tuned.state_dict())
    found = again(ids, mask, prompt_ids=ROWS).logits
    assert again.execution_report().execution == "shared"
    assert relative(found, exact) < (5e-2 if rounds else 1e-5)


@pytest.mark.parametrize(
    ("setting", "rounded"), [("highest", torch.float32), ("high", torch.float16), ("medium", torch.bfloat16)]
)
def test_comparisons_with_what_was_rounded_allow_it(setting: str, rounded: torch.dtype) -> None:
    model = tuned_model("llama").base_model
    torch.set_float32_matmul_precision(setting)
    assert tolerance(model) == TOLERANCE[rounded]
    assert tolerance(model.double()) == TOLERANCE[torch.float64]
    assert tolerance(model.bfloat16()) == TOLERANCE[torch.bfloat16]


@pytest.mark.parametrize("setting", ["high", "medium"])
@pytest.mark.parametrize("factor", [0.0, 0.8])
def test_a_wrong_gradient_is_found(factor: float, setting: str, monkeypatch: pytest.MonkeyPatch) -> None:
    tuned = deep_model("llama")
    ids, mask = batch()
    pack = tuned.runner.pack

    def wrong(selection: Selection, *arguments: Any, **options: Any) -> Any:
        prompts = [factor * prompt + (1 - factor) * prompt.detach() for prompt in selection.prompts]
        return pack(replace(selection, prompts=prompts), *arguments, **options)

    monkeypatch.setattr(tuned.runner, "pack", wrong)
    torch.set_float32_matmul_precision(setting)
    with pytest.raises((TypeError, RuntimeError), match="packed logits differ"):
        tuned(ids, mask, ids, ROWS)


@pytest.mark.parametrize("setting", ["high", "medium"])
def test_wrong_logits_are_found(setting: str) -> None:
    tuned = tuned_model("llama")
    layer = tuned.base_model.model.layers[1].mlp
    own = layer.forward
    layer.forward = lambda x: own(x + 0.03 * F.pad(x, (0, 0, 1, 0))[:, :-1])  # reads the neighbour
    ids, mask = batch()
    torch.set_float32_matmul_precision(setting)
    tuned(ids, mask, prompt_ids=ROWS)
    assert tuned.execution_report().execution == "padded"


def test_a_graph_depends_on_the_products_of_its_device() -> None:
    model, device = build("llama").requires_grad_(False), torch.device("cpu")
    before = model_state(model, device)
    assert before
    torch.backends.mkldnn.matmul.fp32_precision = "bf16"  # then the common setting cannot be read
    assert model_state(model, device) not in ((), before)
