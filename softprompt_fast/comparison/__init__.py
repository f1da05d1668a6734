"""Ways to use one model for one task, compared on the same rows: score, time, memory, storage, cost of a prediction.

Needs the extra ``compare``. ``softprompt-fast compare`` is the same from the command line.
"""

from .run import Comparison, compare
from .settings import METHODS, parse_options

__all__ = ["METHODS", "Comparison", "compare", "parse_options"]
