"""Compares ways to use one model for one task on the same rows: score, time, memory, storage, cost of a prediction.

Needs the extra ``compare``. ``softprompt-fast compare`` does the same from the command line.
"""

from .result import Comparison
from .run import compare
from .settings import METHODS, parse_options

__all__ = ["METHODS", "Comparison", "compare", "parse_options"]
