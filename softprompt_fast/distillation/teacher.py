"""The teacher: the frozen model with the whole text in front, its continuations and its probabilities.

The text is a prompt of token embeddings. It runs once, and its keys and values are kept (:class:`.PromptBank`); where
the model does not allow that, it runs once per batch. What the teacher says is cached on disk by the content that it
depends on, in chunks, so that an interrupted run continues where it was.
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.files import save_tensors_atomically
from ..evaluation.likelihood import ModelBackend
from ..hf.adapters import adapter_state
from ..hf.embedding import embedding_table, own_embedding
from ..hf.generation_options import end_token_ids
from ..inference.engine import Engine
from ..inference.prompt_bank import PromptBank
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.base_identity import base_fingerprint, weights_sha256
from ..prompts.fast_soft_prompt import PromptIds
from ..tasks.collation import pad_token_id, padded
from .divergence import class_log_probabilities, kl_divergence
from .settings import DistillationSettings

logger = logging.getLogger("softprompt_fast")

CACHE_FORMAT = 2
CHUNK = 32
"""Queries that the teacher answers together; one file of the cache."""
LARGEST_LOGITS = 2**28
"""Most numbers of the logits that are computed together, 1 GiB in float32. A long continuation alone may have more."""
ONE_ANSWER: dict[str, Any] = {
    "num_beams": 1,
    "num_return_sequences": 1,
    "return_dict_in_generate": False,
    "output_attentions": False,
}
"""Options of ``generate`` for one row of token ids per query, whatever a model's own configuration says."""
WHOLE_DISTRIBUTION: dict[str, Any] = {
    "temperature": 1.0,
    "top_k": 0,
    "top_p": 1.0,
    "min_p": None,
    "typical_p": 1.0,
    "epsilon_cutoff": 0.0,
    "eta_cutoff": 0.0,
    "top_h": None,
}
"""Sampling options that would leave out tokens, switched off."""
TEXT = "text"
"""Name of the teacher's prompt."""
Identity = dict[str, Any]
UNRELATED = ("transformers_version", "_name_or_path", "architectures")
"""Fields of a configuration on which no answer depends."""
TOLERANCE = 0.01
"""Largest divergence per token of a cached answer from the present model's. Rounding in bfloat16 stays below."""


@dataclass(frozen=True)
class Target:
    """The teacher's continuation of one query."""

    query: list[int]
    """[T] token ids."""
    continuation: list[int]
    """[N] token ids, with the end token if the teacher ends."""
    top_ids: Tensor
    """[N, K] the most probable tokens at each place, the most probable first."""
    log_probabilities: Tensor
    """[N, K + 1] float32, theirs, and last that of all other tokens together."""
    front: tuple[str, ...] | None = None
    """Names of the student's prompts in front of the query, one after the other; None: the one prompt of the text."""


class Teacher:
    """A model with a text in front of its queries.

    Args:
        model: a decoder of transformers with a language-modelling head.
        text_ids: [T]
        cache: folder of the cache; None: nothing is stored.
        parts: a model that has the text as prompts, and their names; several teachers share it. None: a new model.
        identity: :func:`model_identity` of the model, if it is known.
    """

    def __init__(
        self,
        model: Any,
        tokenizer: Any,
        text_ids: Sequence[int],
        settings: DistillationSettings,
        cache: Path | None,
        parts: tuple[SoftPromptModel, tuple[str, ...]] | None = None,
        identity: Identity | None = None,
    ) -> None:
        from transformers import GenerationConfig

        self.tokenizer, self.settings, self.cache = tokenizer, settings, cache
        self.model, self._front = (SoftPromptModel(model), (TEXT,)) if parts is None else parts
        self._engine: Engine | None = None
        """Keeps the text's keys and values. None: the text is one of many arrangements, each with few queries."""
        if parts is None:
            add_text(self.model, TEXT, text_ids)
            self._engine = Engine(PromptBank(self.model))
        self._ends = end_token_ids(model, tokenizer.eos_token_id) or []
        sampled = settings.continuation == "sampled"
        identity = model_identity(model) if identity is None else identity
        self._weights_known = identity["weights"] is not None
        self._facts = {
            "format": CACHE_FORMAT,
            "model": identity,
            "text": list(text_ids),
            "ends": self._ends,
            "generation": _generation_settings(model),
            "new_tokens": settings.new_tokens,
            "top_k": settings.top_k,
            "temperature": settings.temperature,
            "seed": settings.seed if sampled else None,
        }
        fields = vars(GenerationConfig())  # of this version of transformers
        self._draws = {name: value for name, value in WHOLE_DISTRIBUTION.items() if name in fields}
        self._warned = False

    def targets(self, queries: Sequence[list[int]], progress: Callable[[int], None] | None = None) -> list[Target]:
        """The teacher's continuations of queries [T] and its probabilities, from the cache where they are known."""
        found = []
        for start in range(0, len(queries), CHUNK):
            chunk = list(queries[start : start + CHUNK])
            path = None if self.cache is None else self.cache / f"{self._key(chunk)}.safetensors"
            known = None if path is None else self._read(path, chunk)
            if known is None:
                known = self._run(chunk)
                if path is not None:
                    _write(path, known, self._facts)
            found += known
            if progress is not None:
                progress(len(chunk))
        return found

    def add_parts(self, parts: Sequence[Sequence[int]]) -> list[str]:
        """Prompts of the teacher's model for parts [T] of the text; their names."""
        # Named by their content: teachers of other documents may share the model.
        names = [f"part-{hashlib.sha256(json.dumps(list(ids)).encode()).hexdigest()[:32]}" for ids in parts]
        for name, ids in zip(names, parts, strict=True):
            if name not in self.model.prompts:
                add_text(self.model, name, ids)
        return names

    def logits(self, targets: Sequence[Target]) -> Tensor:
        """[M, V] at all places of the continuations, row by row."""
        if self._engine is None:
            return logits_of(self.model, self._front, targets)
        names = [TEXT] * len(targets)
        with self._engine.bank.use(names) as view:
            texts, continuations = [one.query for one in targets], [one.continuation for one in targets]
            return self._engine.target_logits(view, texts, names, continuations)

    def batches(self, targets: Sequence[Target], rows: int) -> Iterator[list[Target]]:
        """The targets in their order, at most `rows` together, and fewer if their logits would be large."""
        vocabulary = len(own_embedding(self.model.get_input_embeddings()).weight)
        batch: list[Target] = []
        for target in targets:
            places = sum(len(one.continuation) for one in (*batch, target))
            if batch and (len(batch) == rows or places * vocabulary > LARGEST_LOGITS):
                yield batch
                batch = []
            batch.append(target)
        if batch:
            yield batch

    def generate(
        self,
        queries: Sequence[list[int]],
        seed: int | None = None,
        speaker: tuple[SoftPromptModel, PromptIds] | None = None,
        **options: Any,
    ) -> list[list[int]]:
        """New tokens after each query [T], up to the end token.

        Args:
            seed: tokens are drawn with this seed; None: the most probable ones are taken.
            speaker: a model and its prompt, or one (None: no prompt) for each query, that speak instead of the teacher.
            options: of transformers' ``generate``.
        """
        given: dict[str, Any] = {"pad_token_id": pad_token_id(self.tokenizer), "do_sample": seed is not None}
        given |= ONE_ANSWER | ({} if seed is None else self._draws) | options
        if self._ends:
            given["eos_token_id"] = self._ends
        with torch.random.fork_rng():
            torch.manual_seed(0 if seed is None else seed)
            if speaker is None and self._engine is not None:
                names = [TEXT] * len(queries)
                with self._engine.bank.use(names) as view:
                    output = self._engine.generate(view, queries, names, given)
            else:
                model, prompts = (self.model, [self._front] * len(queries)) if speaker is None else speaker
                ids, mask = padded(queries, model.device, side="left")
                output = model.generate(ids, mask, prompts, **given)[:, ids.shape[1] :]
        return [self._until_end(row) for row in output.tolist()]

    def judged(self, student: SoftPromptModel, prompt: str, queries: Sequence[list[int]], seed: int) -> list[Target]:
        """Continuations drawn from a student's prompt, with the teacher's probabilities."""
        answers = self.generate(queries, seed, (student, prompt), max_new_tokens=self.settings.new_tokens)
        return self._targets(queries, answers)

    def _run(self, queries: Sequence[list[int]]) -> list[Target]:
        seed = None if self._facts["seed"] is None else int(self._key(queries)[:12], 16)
        return self._targets(queries, self.generate(queries, seed, max_new_tokens=self.settings.new_tokens))

    def _targets(self, queries: Sequence[list[int]], answers: Sequence[list[int]]) -> list[Target]:
        empty = torch.empty(0)
        rows = [Target(query, answer, empty, empty) for query, answer in zip(queries, answers, strict=True)]
        found = []
        for batch in self.batches(rows, CHUNK):
            logits = self.logits(batch)
            count = min(self.settings.top_k, logits.shape[-1] - 1)
            top_ids = logits.topk(count, -1).indices
            values = class_log_probabilities(logits, top_ids, self.settings.temperature)
            lengths = [len(row.continuation) for row in batch]
            parts = zip(batch, top_ids.cpu().split(lengths), values.cpu().split(lengths), strict=True)
            found += [Target(row.query, row.continuation, ids, part) for row, ids, part in parts]
        return found

    def _until_end(self, tokens: list[int]) -> list[int]:
        return next((tokens[: i + 1] for i, token in enumerate(tokens) if token in self._ends), tokens)

    def _key(self, queries: Sequence[list[int]]) -> str:
        content = json.dumps([self._facts, queries])
        return hashlib.sha256(content.encode()).hexdigest()[:32]

    def _read(self, path: Path, queries: Sequence[list[int]]) -> list[Target] | None:
        """The targets of a file; None: there is no such file, it is damaged, or another model has written it."""
        from safetensors import SafetensorError
        from safetensors.torch import load_file

        try:
            stored = load_file(path)
            lengths = stored["lengths"].tolist()
            parts = [stored[name].split(lengths) for name in ("tokens", "top_ids", "log_probabilities")]
        except (OSError, SafetensorError, KeyError, RuntimeError):
            return None
        targets = [
            Target(query, tokens.tolist(), top_ids.long(), values)
            for query, tokens, top_ids, values in zip(queries, *parts, strict=True)
        ]
        if self._weights_known or self._agrees(targets[0]):
            return targets
        if not self._warned:
            logger.warning("the teacher's cache holds the answers of other weights; it is written again")
        self._warned = True
        return None

    @torch.no_grad()
    def _agrees(self, target: Target) -> bool:
        """Whether this model gives a cached answer its probabilities; asked where its weights cannot be read."""
        values = class_log_probabilities(
            self.logits([target]), target.top_ids.to(self.model.device), self.settings.temperature
        )
        return kl_divergence(target.log_probabilities, values.cpu()).mean().item() <= TOLERANCE


def model_identity(model: Any) -> Identity:
    """What a model's answers depend on. ``weights`` is None where some cannot be read."""
    config = model.config.to_diff_dict()
    weights = weights_sha256(model)
    return {
        "base": base_fingerprint(model),
        "weights": weights,
        "adapters": [state for module in model.modules() if (state := adapter_state(module))],
        "name": getattr(model, "name_or_path", "") if weights is None else None,
        "dtype": str(model.dtype),
        "config": {key: repr(value) for key, value in sorted(config.items()) if key not in UNRELATED},
    }


def add_text(model: SoftPromptModel, name: str, ids: Sequence[int]) -> None:
    """Adds a prompt of the embeddings of token ids [T], as a text reads."""
    table = embedding_table(model.get_input_embeddings())
    vectors = table(torch.tensor(list(ids), device=table.weight.device))
    model.add_prompt(name, init=vectors.detach().float())


def _generation_settings(model: Any) -> dict[str, str]:
    """What a model's own configuration says of continuations, such as a repetition penalty."""
    config = getattr(model, "generation_config", None)
    changed = {} if config is None else config.to_diff_dict()
    return {name: repr(value) for name, value in sorted(changed.items()) if name not in UNRELATED}


def logits_of(model: SoftPromptModel, prompt: str | tuple[str, ...] | None, targets: Sequence[Target]) -> Tensor:
    """[M, V], a model's logits at all places of the teacher's continuations, row by row; no gradient."""
    names = [prompt] * len(targets)
    backend = ModelBackend(model, names)
    return backend.target_logits([target.query for target in targets], [target.continuation for target in targets])


def _write(path: Path, targets: Sequence[Target], facts: dict[str, Any]) -> None:
    tensors = {
        "lengths": torch.tensor([len(target.continuation) for target in targets]),
        "tokens": torch.tensor([token for target in targets for token in target.continuation]),
        "top_ids": torch.cat([target.top_ids for target in targets]).int(),
        "log_probabilities": torch.cat([target.log_probabilities for target in targets]).contiguous(),
    }
    save_tensors_atomically(path, tensors, {"facts": json.dumps(facts)})
