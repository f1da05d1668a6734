"""A part of the model types: every way to run them is exact or refused with a reason. `make sweep` runs all types."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from sweep import heads
from sweep.model_types import build, every_type
from sweep.outcomes import ENTRIES, NOTE, Wrong, equal, outcomes
from sweep.run import counted
from sweep.table import written

DOCS = Path(__file__).parents[2] / "docs"
PART = [
    "CausalLM:llama",
    "CausalLM:bert",
    "CausalLM:gemma3n_text",  # embeds tokens again in every layer
    "CausalLM:gpt_oss",  # sinks
    "CausalLM:deepseek_v3",  # compressed keys and values
    "CausalLM:hrm_text",  # found by the comparison of a batch
    "CausalLM:mamba2",
    "CausalLM:modernbert-decoder",
    "CausalLM:prophetnet",  # reads padding
    "CausalLM:qwen3_next",
    "CausalLM:gemma4_unified_text",  # sizes that differ between layers
    "CausalLM:cpmant",  # takes no vectors
    "Seq2SeqLM:pegasus",
    "Seq2SeqLM:t5",
    "Seq2SeqLM:m2m_100",
]
"""One of each kind, about a second each."""


@pytest.mark.parametrize("name", [name for name in PART if name in every_type()])
def test_every_entry_is_exact_or_refused(name: str) -> None:
    found = outcomes(build(name))
    found.pop(NOTE, None)
    assert set(found) <= set(ENTRIES) and len(found) >= 5
    assert all(outcome.startswith(("exact", "refused: ")) for outcome in found.values()), found


@pytest.mark.parametrize(
    "kind", ["llama", "gpt2", "bert", "mpt", "xlnet", "deberta-v2", "mobilebert", "reformer", "t5"]
)
@pytest.mark.parametrize("head", heads.HEADS)
def test_every_head_is_exact_or_refused(head: str, kind: str) -> None:
    if f"{head}:{kind}" in heads.every_head():
        found = heads.outcome(f"{head}:{kind}")
        assert found.startswith(("exact", "refused: ")), found


def test_a_difference_is_wrong() -> None:
    with pytest.raises(Wrong, match=r"x: differs by 1\.0e-02"):
        equal(torch.ones(3) * 1.01, torch.ones(3), "x")
    with pytest.raises(Wrong, match="shape"):
        equal(torch.ones(3), torch.ones(4), "x")
    assert counted({"a": {"forward": "exact", "deep": "wrong: x"}})["wrong"] == 1


def test_the_table_in_the_docs_is_the_one_of_the_last_sweep() -> None:
    page = (DOCS / "support.md").read_text()
    assert written(page, json.loads((DOCS / "support.json").read_text())) == page
