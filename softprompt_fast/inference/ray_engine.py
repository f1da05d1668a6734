"""The same answers from many machines with Ray Data, which handles back-pressure, retries and lost workers."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..prompts.base_identity import check_known_base
from ..prompts.peft_files import is_deep, prompts_by_name, read_base, read_prompt
from ..tasks.examples import Examples
from ..tasks.task import TASK_FILE, Task
from ..tasks.values import plain
from .files import answer_rows
from .requests import Result

BATCH = 64
"""Rows of a Ray task; at most these are computed again when a worker is lost."""


class Worker:
    """Loads the model once and answers batches of rows; an actor of Ray Data.

    Args:
        prompts: reference to the prompts in Ray's object store, one copy per machine.
    """

    def __init__(
        self, prompts: Any, base: str, options: Mapping[str, Any], settings: Mapping[str, Any], threads: int | None
    ) -> None:
        import ray

        from ..hf.loading import load_base_model
        from .pipeline import SoftPromptPipeline
        from .prompt_bank import PromptBank

        if threads is not None:
            torch.set_num_threads(threads)
        model, tokenizer = load_base_model(
            base,
            settings["dtype"],
            settings["device"],
            adapter=settings.get("adapter"),
            quantize=settings.get("quantize"),
        )
        bank = PromptBank(model)
        self.refusal: str | None = None
        """Why the prompts cannot be used with this model. An error here would make Ray start workers for ever."""
        for name, (vectors, task, (base_name, fingerprint)) in ray.get(prompts).items():
            try:
                check_known_base(name, base_name, fingerprint, model)
                bank.add(name, torch.from_numpy(vectors.copy()), task=Task(**task) if task else None)
            except ValueError as error:
                self.refusal = str(error)
        self.options = options
        self.pipeline = SoftPromptPipeline(
            bank, tokenizer, max_batch_rows=settings["batch_size"], max_batch_tokens=settings["batch_tokens"]
        )

    def __call__(self, batch: dict[str, Any]) -> dict[str, Any]:
        texts = [""] * len(batch["index"])
        if self.refusal is None:
            rows = [json.loads(row) for row in batch["row"]]
            names = [json.loads(name) for name in batch["prompt"]]
            texts = [json.dumps(result) for result in answer_rows(self.pipeline, rows, names, self.options)]
        refusals = [self.refusal or ""] * len(texts)
        return {
            "index": batch["index"],
            "result": np.array(texts, dtype=object),
            "refusal": np.array(refusals, dtype=object),
        }


class RayAnswers:
    """Answers for :func:`write_answers`, computed by a pool of workers.

    Args:
        prompts: a folder of prompts; read here, sent to the workers once.
        base: name of the base model, which workers load themselves.
        workers: number of workers; each gets a GPU if the cluster has some.
        options: generation options.
        settings: ``batch_size``, ``batch_tokens``, ``dtype``, ``device``.
        task: of prompts whose folder has none.
        force: also use prompts that were tuned on other weights than the model's.

    Raises:
        ValueError: a deep prompt: workers get vectors, and a deep prompt has keys and values. When answers are asked
            for: a prompt that does not belong to the model.
    """

    def __init__(
        self,
        rows: Examples,
        names: Sequence[str | None],
        prompts: Path,
        base: str,
        workers: int,
        options: Mapping[str, Any],
        settings: Mapping[str, Any],
        *,
        task: Task | None = None,
        force: bool = False,
    ) -> None:
        self.rows, self.names, self.base, self.workers = rows, names, base, workers
        self.options, self.settings = dict(options), dict(settings)
        self.prompts = {}
        folders = prompts_by_name(prompts)
        deep = [name for name, folder in folders.items() if is_deep(folder)]
        if deep:
            raise ValueError(f"--engine ray cannot be combined with deep prompts, got {', '.join(deep)}")
        for name, folder in folders.items():
            own = Task.load(folder) if (folder / TASK_FILE).is_file() else task
            self.prompts[name] = (
                read_prompt(folder)[0].numpy(),
                None if own is None else asdict(own),
                (None, None) if force else read_base(folder),
            )

    def __call__(self, start: int) -> Iterator[list[Result]]:
        import ray

        if start >= len(self.rows):
            return
        ray.init(ignore_reinit_error=True, log_to_driver=False)
        context = ray.data.DataContext.get_current()
        context.execution_options.preserve_order = True
        context.enable_progress_bars = False
        gpus = 1 if ray.cluster_resources().get("GPU") else 0
        cores = ray.cluster_resources().get("CPU", 1)
        threads = None if gpus else max(1, int(cores // self.workers))
        items = [
            {"index": i, "row": json.dumps(plain(self.rows[i])), "prompt": json.dumps(self.names[i])}
            for i in range(start, len(self.rows))
        ]
        blocks = -(-len(items) // BATCH)
        answered = ray.data.from_items(items, override_num_blocks=blocks).map_batches(
            Worker,
            batch_size=BATCH,
            concurrency=self.workers,
            num_gpus=gpus,
            fn_constructor_args=(ray.put(self.prompts), self.base, self.options, self.settings, threads),
        )
        expected = start
        for batch in answered.iter_batches(batch_size=BATCH, batch_format="numpy"):
            if batch["index"].tolist() != list(range(expected, expected + len(batch["index"]))):
                raise RuntimeError(f"rows came back out of order after row {expected}")
            if refusal := str(batch["refusal"][0]):
                raise ValueError(refusal)
            expected += len(batch["index"])
            yield [json.loads(result) for result in batch["result"]]
        if expected != len(self.rows):
            raise RuntimeError(f"only {expected} of {len(self.rows)} rows came back")
