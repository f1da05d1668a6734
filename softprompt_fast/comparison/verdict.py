"""Is prompt tuning the right choice here? A sentence derived from the numbers by fixed rules."""

from __future__ import annotations

from collections.abc import Sequence

from .settings import UNTRAINED
from .summary import REFERENCE, MethodSummary
from .words import size

ALPHA = 0.05
RULES = (
    f"'Clearly' means: the paired test against the soft prompt has p < {ALPHA} after Holm's correction.",
    "If a method without training is not clearly worse than the soft prompt, tuning has not paid off.",
    "Else, if another method is clearly better, it is the choice where it stores no more per task; where it stores "
    "more, the choice is between its gain and its size.",
    "Else the soft prompt is the choice, unless a method that is not clearly worse stores less per task and puts "
    "fewer tokens in front.",
)


def verdict(summaries: Sequence[MethodSummary], kind: str) -> str:
    """One or a few sentences."""
    by_name = {s.method: s for s in summaries}
    own = by_name.get(REFERENCE)
    if own is None or own.score is None or own.stored_bytes is None:
        return "No answer: the soft prompt was not part of this comparison or has no result."
    others = [s for s in summaries if s.method != REFERENCE and s.difference is not None]
    if not others:
        return "No answer: no other method has a result to compare the soft prompt with."
    sign = 1.0 if kind == "classification" else -1.0
    better = [s for s in others if _clearly(s) and sign * (s.difference or 0.0) > 0]
    worse = [s for s in others if _clearly(s) and sign * (s.difference or 0.0) < 0]
    free = [s for s in others if s.method in UNTRAINED and s not in worse]
    what = f"{_score(own.score, kind)} with a soft prompt"
    if free:
        best = max(free, key=lambda s: sign * (s.score or 0.0))
        return (
            f"No, not by these numbers: {best.method} reaches {_score(best.score, kind)} without any training, and "
            f"{what} is not clearly better ({_p(best)})." + _also(better)
        )
    if better:
        best = max(better, key=lambda s: sign * (s.score or 0.0))
        gain = f"{best.method} is clearly better: {_score(best.score, kind)} against {what} ({_p(best)})"
        if (best.stored_bytes or 0) <= own.stored_bytes:
            return f"No: {gain}, and it stores {size(best.stored_bytes)} per task against {size(own.stored_bytes)}."
        return (
            f"It depends: {gain}, but it stores {size(best.stored_bytes)} per task against "
            f"{size(own.stored_bytes)}. For one task take {best.method}; for many tasks on one model weigh its gain "
            "against its size."
        )
    smaller = [
        s
        for s in others
        if s not in worse
        and (s.stored_bytes or 0) < own.stored_bytes
        and (s.prefix_tokens or 0) < (own.prefix_tokens or 0)
    ]
    if smaller:
        names = ", ".join(s.method for s in smaller)
        return f"It may be, but {names} is not clearly worse than {what}, stores less and reads fewer tokens per row."
    similar = [s.method for s in others if s not in worse]
    text = f"Yes: {what}, and no method is clearly better"
    if similar:
        text += (
            f"; {', '.join(similar)} cannot be told apart from it on these rows, but stores more or reads more tokens"
        )
    return text + "."


def _also(better: Sequence[MethodSummary]) -> str:
    trained = [s.method for s in better if s.method not in UNTRAINED]
    return f" Clearly better than the soft prompt: {', '.join(trained)}." if trained else ""


def _clearly(summary: MethodSummary) -> bool:
    return summary.p_holm is not None and summary.p_holm < ALPHA


def _score(value: float | None, kind: str) -> str:
    return f"accuracy {value:.3f}" if kind == "classification" else f"loss {value:.3f}"


def _p(summary: MethodSummary) -> str:
    if summary.p_holm is None:
        return "not tested"
    return "p < 0.001" if summary.p_holm < 0.001 else f"p = {summary.p_holm:.3f}"
