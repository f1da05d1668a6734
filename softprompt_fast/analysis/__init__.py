"""Analysis of data before tuning and of prompts after it."""

from ..base.figures import save_figure
from .data_analysis import analyze
from .figures import analysis_figure, interpretation_figure, pruning_figure, similarity_figure
from .interpretation import Interpretation, interpret
from .pruning import Pruned, prune
from .results import Analysis
from .transfer import Similarity, similar

__all__ = [
    "Analysis",
    "Interpretation",
    "Pruned",
    "Similarity",
    "analysis_figure",
    "analyze",
    "interpret",
    "interpretation_figure",
    "prune",
    "pruning_figure",
    "save_figure",
    "similar",
    "similarity_figure",
]
