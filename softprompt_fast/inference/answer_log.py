"""The log of answers: a line for each row, from which monitoring needs no second pass of the model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import suppress
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from ..base.files import append_json_lines
from ..evaluation.observations import InputReader, answered
from ..evaluation.profile import Profile, prompt_digest
from ..hf.architecture import is_encoder_decoder
from ..tasks.encoding import encode_text
from ..tasks.examples import Examples
from ..tasks.task import TASK_FILE, Task
from .pipeline import SoftPromptPipeline
from .requests import Result


class AnswerLog:
    """Appends observations of answered rows to a file, as JSON lines.

    Args:
        path: the file; earlier lines stay. Other processes may write to it too.
        pipeline: answers the rows.
        folders: the folder of each prompt. Rows of other prompts, and of those without a task, are not logged.
        texts: whether a line also holds the text. Without it, a line holds a digest of the text.

    Raises:
        ValueError: no prompt has a task.
    """

    def __init__(
        self, path: Path, pipeline: SoftPromptPipeline, folders: Mapping[str, Path], *, texts: bool = True
    ) -> None:
        self.path, self.texts, self.tokenizer = path, texts, pipeline.tokenizer
        self._encoder_decoder = is_encoder_decoder(pipeline.bank.model.base_model)
        embedding = pipeline.bank.model.get_input_embeddings()
        self._prompts: dict[str, tuple[Task, InputReader, dict[str, Any]]] = {}
        for name, folder in folders.items():
            task = pipeline.bank.task(name)
            if task is None or not (folder / TASK_FILE).is_file():
                continue
            facts = {"prompt": name, "digest": prompt_digest(folder, task)}
            known = None
            with suppress(FileNotFoundError):  # a prompt without a profile
                profile = Profile.load(folder)
                known, facts["reference"] = profile.known_tokens, profile.tokens_digest
            self._prompts[name] = task, InputReader(embedding, self.tokenizer, known), facts
        if not self._prompts:
            raise ValueError(f"a log must be of prompts with a {TASK_FILE}, got {', '.join(folders)}")

    def write(self, rows: Examples, names: Sequence[str | None], results: Sequence[Result]) -> None:
        """Logs a list of rows with their prompts and their results."""
        now = datetime.now(UTC).isoformat(timespec="seconds")
        lines = [
            {"time": now} | self._line(row, name, result)
            for row, name, result in zip(rows, names, results, strict=True)
            if name in self._prompts
        ]
        append_json_lines(self.path, lines)

    def _line(self, row: Mapping[str, Any], name: str, result: Result) -> dict[str, Any]:
        task, reader, facts = self._prompts[name]
        if "error" in result:
            # The message of an error can quote the row.
            return facts | {"error": result["error"] if self.texts else "no answer"}
        text = task.text(row)
        seen = reader.read(text, encode_text(task, row, self.tokenizer, encoder_decoder=self._encoder_decoder))
        if "scores" in result:
            label = None
            with suppress(ValueError):  # an answer needs no label: what is none is not logged
                label = task.label(row)
            seen = answered(seen, result["scores"], label)
        return facts | seen.to_json() | ({"text": text} if self.texts else {})
