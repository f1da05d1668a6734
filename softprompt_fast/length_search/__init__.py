"""Finds a sufficient prompt length: successive halving over lengths and learning rates, within a budget, resumable.

Needs the extra ``search``. The command line has it as ``softprompt-fast search``.
"""

from .result import Candidate, RungResult, SearchResult
from .run import DEFAULT_LENGTHS, search
from .study import LogRange

__all__ = ["DEFAULT_LENGTHS", "Candidate", "LogRange", "RungResult", "SearchResult", "search"]
