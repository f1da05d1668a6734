"""A logistic regression on the frozen model's hidden states."""

from __future__ import annotations

import inspect
import time
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..evaluation.scores import RowScores
from ..tasks.collation import length_order
from ..tasks.examples import Examples
from ..tasks.task import Task
from .backends import Plain
from .encoding import Encoder
from .splits import truth


@dataclass
class Probe:
    """A fitted probe and how its C was chosen."""

    features: Any
    """Rows -> [rows, D] on the host."""
    pipeline: Any
    task: Task
    C: float
    searched: list[dict[str, float]]
    """Validation scores of every C."""
    evaluation_seconds: float

    @property
    def parameters(self) -> int:
        model = self.pipeline[-1]
        return int(model.coef_.size + model.intercept_.size)

    def score(self, rows: Examples) -> RowScores:
        return _scores(self.pipeline, self.task, self.features(rows), rows)

    def save(self, folder: Path) -> None:
        """Writes everything that a prediction needs besides the frozen model, in float32."""
        from safetensors.numpy import save_file

        scaler, model = self.pipeline[0], self.pipeline[-1]
        arrays = {"mean": scaler.mean_, "scale": scaler.scale_, "coef": model.coef_, "intercept": model.intercept_}
        save_file(
            {name: np.ascontiguousarray(a, dtype=np.float32) for name, a in arrays.items()},
            folder / "probe.safetensors",
        )


def fit_probe(
    model: Any, tokenizer: Any, task: Task, splits: Mapping[str, Examples], options: Mapping[str, Any], batch_size: int
) -> Probe:
    """Fits on standardised features and keeps the C with the lowest validation loss.

    The other methods choose their checkpoints by the same loss.
    """
    from sklearn.linear_model import LogisticRegression
    from sklearn.pipeline import make_pipeline
    from sklearn.preprocessing import StandardScaler

    encoder, plain = Encoder(task, tokenizer), Plain(model, tokenizer)

    def features(rows: Examples) -> np.ndarray[Any, Any]:
        return last_states(plain, encoder.texts(rows), batch_size)

    x, y = features(splits["train"]), truth(task, splits["train"])
    if len(set(y)) < 2:
        raise ValueError(f"the training rows must have at least two labels, got {sorted(set(y))}")
    start = time.perf_counter()
    held_out = features(splits["validation"])
    evaluation_seconds = time.perf_counter() - start
    values = options["C"] if isinstance(options["C"], list) else [options["C"]]
    fitted, searched = [], []
    for value in values:
        pipeline = make_pipeline(StandardScaler(), LogisticRegression(C=value, max_iter=int(options["max_iter"])))
        pipeline.fit(x, y)
        scores = _scores(pipeline, task, held_out, splits["validation"])
        accuracy = scores.accuracy
        assert accuracy is not None
        searched.append({"C": value, "accuracy": accuracy, "loss": scores.loss})
        fitted.append((scores.loss, value, pipeline))
    _, chosen, pipeline = min(fitted, key=lambda one: one[0])
    return Probe(features, pipeline, task, chosen, searched, evaluation_seconds)


@torch.no_grad()
def last_states(plain: Plain, texts: list[list[int]], batch_size: int) -> np.ndarray[Any, Any]:
    """[rows, D], the last hidden state (after the last normalisation) at each text's last token."""
    decoder = plain.model.base_model
    accepts = set(inspect.signature(decoder.forward).parameters)
    states = None
    for indices in length_order([len(text) for text in texts], batch_size):
        inputs = plain.left_padded([texts[i] for i in indices])
        inputs = {name: value for name, value in inputs.items() if name in accepts}
        if "use_cache" in accepts:
            inputs["use_cache"] = False
        last = decoder(**inputs).last_hidden_state[:, -1].float().cpu().numpy()
        if states is None:
            states = np.zeros((len(texts), last.shape[1]), dtype=np.float32)
        states[indices] = last
    assert states is not None
    return states


def _scores(pipeline: Any, task: Task, x: np.ndarray[Any, Any], rows: Examples) -> RowScores:
    """Scores of labelled rows. A label that no training row has gets the probability 1e-12."""
    scores = torch.full((len(rows), len(task.labels)), np.log(1e-12), dtype=torch.float64)
    with np.errstate(divide="ignore"):  # a probability of 0 gets a lower bound below
        log_probabilities = torch.from_numpy(pipeline.predict_log_proba(x)).double()
    for column, label in enumerate(pipeline.classes_):
        scores[:, task.labels.index(str(label))] = log_probabilities[:, column].clamp(min=float(np.log(1e-12)))
    places = torch.tensor([task.labels.index(label) for label in truth(task, rows)])
    predicted = scores.argmax(-1)
    losses = -scores.gather(-1, places[:, None])[:, 0]
    return RowScores(losses, torch.ones(len(rows), dtype=torch.float64), predicted, predicted == places)
