"""The public names. A name added or removed here is a change that users notice."""

from __future__ import annotations

import importlib

import pytest
from support.public_packages import PUBLIC_PACKAGES

PUBLIC = {
    "softprompt_fast": """
        DeepPromptModel FastSoftPrompt PackedRows PromptedBatch SoftPromptModel __version__ accelerate assemble
        initial_prompt pooled_text restore
    """,
    "softprompt_fast.prompts": """
        FastSoftPrompt FixedFirst LowRank NormBound Offset PromptDropout ResidualMLP SharedPart bos_vector fold
        initial_prompt push_to_hub read_prompt reparameterize write_card write_prompt
    """,
    "softprompt_fast.tasks": """
        Head Task answering_task classification_task complete_rows generation_task load_rows sequence_task split_rows
        tagging_task
    """,
    "softprompt_fast.hf": "ModelWithHead SMOLLM2 load_base_model load_model_with_head",
    "softprompt_fast.tuning": """
        EnsembleResult Task TuningJob TuningResult TuningSettings evaluate evaluate_ensemble load_base_model load_rows
        predict split_rows tune tune_ensemble tune_tasks
    """,
    "softprompt_fast.evaluation": "RowScores evaluate evaluate_ensemble predict score_prompts",
    "softprompt_fast.inference": "PromptBank SoftPromptPipeline",
    "softprompt_fast.analysis": """
        Analysis Interpretation Pruned Similarity analysis_figure analyze interpret interpretation_figure prune
        pruning_figure save_figure similar similarity_figure
    """,
    "softprompt_fast.comparison": "Comparison METHODS compare parse_options",
    "softprompt_fast.distillation": """
        CompressedPrompt Compression DistillationSettings DocumentCompression DocumentPrompt Retention compress
        compress_documents join_prompts retention_figure write_page
    """,
    "softprompt_fast.length_search": "Candidate DEFAULT_LENGTHS LogRange RungResult SearchResult search",
    "softprompt_fast.monitoring": "DriftTest Monitor Observation Profile Report observe record_profile",
    "softprompt_fast.registry": """
        ChangedAnswer Distance Move PromptRegistry PromptVersion Record VersionDifference
    """,
    "softprompt_fast.interop": "accelerate reference_model restore",
}


def test_every_public_package_is_pinned() -> None:
    assert list(PUBLIC) == PUBLIC_PACKAGES


@pytest.mark.parametrize("package", PUBLIC)
def test_public_names(package: str) -> None:
    module = importlib.import_module(package)
    assert sorted(module.__all__) == sorted(PUBLIC[package].split())
    for name in module.__all__:
        assert getattr(module, name) is not None


@pytest.mark.parametrize("package", PUBLIC)
def test_public_functions_and_classes_have_docstrings(package: str) -> None:
    module = importlib.import_module(package)
    callables = [name for name in module.__all__ if callable(getattr(module, name))]
    assert [name for name in callables if not getattr(module, name).__doc__] == []
