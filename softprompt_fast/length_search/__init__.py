"""Which prompt length is enough: successive halving over lengths and learning rates, within a budget, resumable.

Needs the extra ``search``. ``softprompt-fast search`` is the same from the command line.
"""

from .result import Candidate, RungResult, SearchResult
from .run import DEFAULT_LENGTHS, search
from .study import LogRange

__all__ = ["DEFAULT_LENGTHS", "Candidate", "LogRange", "RungResult", "SearchResult", "search"]
