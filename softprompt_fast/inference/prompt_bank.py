"""``PromptBank``: hundreds of prompts of one model, ready to be used in any mix, from any thread."""

from __future__ import annotations

import logging
import threading
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from os import PathLike
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from ..base.errors import Unsupported
from ..base.locations import located
from ..compiled import storage
from ..compiled.compile import compile_prompts, layered, slot_shape
from ..compiled.prompt_cache import weights_version
from ..compiled.slots import SlotTable
from ..hf.embedding import vectors_like
from ..models.head_users import use_head
from ..models.head_weights import check_one_head, install_head, stored_head
from ..models.soft_prompt_model import SoftPromptModel
from ..prompts.base_identity import check_base
from ..prompts.fast_soft_prompt import FastSoftPrompt, check_name
from ..prompts.peft_files import is_deep, prompts_by_name, read_prefix, read_prompt
from ..prompts.vector_files import read_file
from ..tasks.task import TASK_FILE, Task

logger = logging.getLogger("softprompt_fast")

STORAGES = ("device", "host")
DEFAULT_BUDGET = 1 << 30


@dataclass(eq=False)
class Entry:
    """A resident prompt. Its vectors never change: replacing a prompt makes another entry."""

    name: str
    vectors: Tensor
    """[P, D]; [P, L * 2 * H' * E] of a deep prompt."""
    deep: bool = False
    """Whether it holds keys and values already."""
    task: Task | None = None
    first: int | None = None
    """Its first slot among the compiled prompts; None: not compiled."""
    pins: int = 0
    """Batches that read it now."""
    gone: bool = False
    """Removed or replaced; its slots are released with the last pin."""
    used: float = 0.0

    def __len__(self) -> int:
        return len(self.vectors)


@dataclass(eq=False)
class View:
    """The prompts of one batch, as they were when it began."""

    prompts: FastSoftPrompt
    """The prompts that the batch uses."""
    compiled: Tensor | None
    """[L, 2, R, H', E]; None: prompts run with their batch."""
    prefixes: list[tuple[int, int]]
    """Per row: first slot and length of its prompt in ``compiled``; (0, 0): none."""
    deep: frozenset[str] = frozenset()
    """Names of deep prompts: they are keys and values, and cannot run with the batch."""


class PromptBank:
    """Resident prompts of a frozen model.

    A prompt's vectors stay in memory; its keys and values (the *compiled* prompt) are computed when a batch first needs
    them, all missing ones of a batch in one run, and kept within a budget: the least recently used prompts are evicted.
    If the model's weights change, or its adapters are switched, they are computed again.
    All methods may be called from several threads; a running batch keeps the prompts it began with.

    Args:
        model: a transformers model, or a :class:`SoftPromptModel` whose prompts are taken over.
        budget: bytes of compiled prompts, :attr:`bytes_per_token` for each virtual token; 0: none are compiled.
        storage: "device": on the model's device. "host": in (pinned) host memory; a batch's prompts are copied over.
        check: compare the first batch on compiled prompts with the same batch run with its prompts in it, which is
            itself compared with each row run alone.
    """

    def __init__(
        self, model: Any, *, budget: int = DEFAULT_BUDGET, storage: str = "device", check: bool = True
    ) -> None:
        if storage not in STORAGES:
            raise ValueError(f"`storage` must be one of {', '.join(STORAGES)}, got {storage!r}")
        if budget < 0:
            raise ValueError(f"`budget` must be a number of bytes, got {budget}")
        wrapped = isinstance(model, SoftPromptModel)
        prompts, base, runner = (model.prompts, model.base_model, model.runner) if wrapped else (None, model, None)
        graphs = runner is None or runner.graphs is not None
        self.model = SoftPromptModel(base, check=check, cuda_graphs=graphs, train_head=False).eval()
        use_head(self.model.base_model, self)
        self.check, self.storage = check, storage
        self.hits = self.misses = self.evictions = 0
        self.uncompiled: str | None = None
        """Why prompts are not compiled; None: they are."""
        self._entries: dict[str, Entry] = {}
        self._lock = threading.RLock()
        self._compiling = threading.Lock()
        self._state = weights_version(self.model.base_model)
        """Of the model, when the compiled prompts were computed."""
        runner = self.model.runner
        assert runner is not None  # only execution="padded" has none
        reason, shape = runner.unsupported, None
        try:
            shape = slot_shape(base) if reason is None else None
        except Unsupported as error:
            reason = str(error)
        self._shape: tuple[int, int, int, int] | None = shape
        if shape is None:
            self.uncompiled = f"the model cannot run prompts and texts separately: {reason}"
            self.bytes_per_token = 0
        else:
            weight = vectors_like(base.get_input_embeddings())
            self.bytes_per_token = torch.Size(shape).numel() * weight.element_size()
            on_host = storage == "host" and weight.device.type != "cpu"
            place = "cpu" if storage == "host" else weight.device
            self._table = SlotTable(shape, weight.dtype, place, budget // self.bytes_per_token, pin_memory=on_host)
            if budget < self.bytes_per_token:
                self.uncompiled = f"the budget of {budget} bytes holds no virtual token ({self.bytes_per_token} bytes)"
        if prompts is not None:
            for name in prompts:
                self.add(name, prompts.plain_parameter(name, purpose="PromptBank"))

    # --- what is in it ---

    @property
    def names(self) -> list[str]:
        with self._lock:
            return list(self._entries)

    @property
    def compiled(self) -> list[str]:
        """Names of the prompts that are compiled now."""
        with self._lock:
            return [name for name, entry in self._entries.items() if entry.first is not None]

    def __len__(self) -> int:
        return len(self._entries)

    def __contains__(self, name: object) -> bool:
        return name in self._entries

    def __getitem__(self, name: str) -> Tensor:
        """The vectors [P, D] of a prompt; a deep prompt's keys and values [P, L * 2 * H' * E]."""
        return self._entry(name).vectors

    def task(self, name: str) -> Task | None:
        """The task that a prompt was tuned for, if its folder says so."""
        return self._entry(name).task

    def stats(self) -> dict[str, int]:
        """Numbers of prompts, compiled prompts and their bytes, and of hits, misses and evictions."""
        with self._lock:
            slots = sum(len(entry) for entry in self._entries.values() if entry.first is not None)
            return {
                "prompts": len(self._entries),
                "compiled": len(self.compiled),
                "compiled_bytes": slots * self.bytes_per_token,
                "hits": self.hits,
                "misses": self.misses,
                "evictions": self.evictions,
            }

    def add(
        self,
        name: str,
        source: Tensor | PathLike[str] | str,
        *,
        task: Task | None = None,
        replace: bool = False,
        force: bool = False,
    ) -> None:
        """Adds a prompt: a tensor [P, D], a PEFT adapter folder (its ``task.json`` is read too) or a file.

        A deep prompt (PEFT's folder of a prefix or a cartridge, or numbers [P, L * 2 * H' * E]) is already compiled.
        The model gets the head that was saved with a prompt. All prompts of a model must have the same head, or none.

        Args:
            name: letters, digits, ``_`` and ``-``.
            source: also the name of a version in the registry, such as ``sentiment@production``, a repository on the
                Hub, such as ``user/repo``, a task of a folder with several, such as ``folder#2``, or a safetensors or
                ``.npy`` file or a soft prompt of KoboldAI.
            replace: replace a prompt of that name; running batches continue with the old one.
            force: also add a prompt that was tuned on other weights than the model's, or with another head than the
                bank's other prompts, which then use this one.

        Raises:
            ValueError: a name that is taken or not allowed, another width, other weights or another head than the
                model's, numbers not finite; a deep prompt where none can be compiled.
        """
        check_name(name)
        if not isinstance(source, Tensor):
            source = located(source)
            if source.is_file():
                source = read_file(source)
            else:
                check_base(source, self.model.base_model, force=force)
        head: dict[str, Tensor] = {}
        width, shape = self.model.prompts.embedding_dim, self._shape
        if isinstance(source, Tensor):
            vectors, made_for = source.detach(), None
            deep = vectors.shape[-1] != width and shape is not None and vectors.shape[-1] == torch.Size(shape).numel()
        else:
            deep = is_deep(source)
            if deep and shape is None:
                raise ValueError(f"prompt {name!r} is a deep prompt, which this model cannot run: {self.uncompiled}")
            head = stored_head(source, self.model.base_model)
            if not force:
                check_one_head(source, head, self.model.base_model, self, [n for n in self.names if n != name])
            if deep and shape is not None:
                vectors, config = read_prefix(source, shape)
            else:
                vectors, config = read_prompt(source, loaded=head)
            made_for = config.get("base_model_name_or_path")
            if task is None and (Path(source) / TASK_FILE).is_file():
                task = Task.load(source)
        if deep and self.uncompiled is not None:
            raise ValueError(f"prompt {name!r} is a deep prompt, which runs only compiled: {self.uncompiled}")
        if vectors.dim() != 2 or vectors.shape[0] < 1 or (vectors.shape[1] != width and not deep):
            made = f" (made for {made_for!r})" if made_for else ""
            raise ValueError(
                f"prompt {name!r} must have shape [P, {width}] like the model, got {list(vectors.shape)}{made}"
            )
        if not vectors.is_floating_point() or not torch.isfinite(vectors).all():
            raise ValueError(f"prompt {name!r} must be finite floating-point numbers")
        device = "cpu" if deep else self.model.device  # a deep prompt is only read from the table
        entry = Entry(name, vectors.to(device=device, dtype=torch.float32, copy=True), deep, task)
        with self._lock:
            if name in self._entries:
                if not replace:
                    raise ValueError(f"`name` must be new, but the bank has a prompt {name!r}; pass replace=True")
                self._retire(self._entries[name])
            install_head(head, self.model.base_model)
            self._entries[name] = entry

    def add_directory(self, directory: PathLike[str] | str, *, replace: bool = False, force: bool = False) -> list[str]:
        """Adds the prompt of an adapter folder or a version, or of every adapter folder in a directory.

        Returns the names, which are the folders', with ``-`` for characters that a name cannot have. Of a folder with
        several tasks each is added, as ``folder-0`` and so on. Other arguments as in :meth:`add`.
        """
        folders = prompts_by_name(directory)
        for name, folder in folders.items():
            self.add(name, folder, replace=replace, force=force)
        return list(folders)

    def remove(self, name: str) -> None:
        """Removes a prompt; running batches finish with it."""
        with self._lock:
            self._retire(self._entry(name))
            del self._entries[name]

    # --- compiled prompts ---

    def compile(self, names: Sequence[str] | None = None) -> None:
        """Computes keys and values in advance, of all prompts or of these; as many as the budget holds."""
        with self.use(list(self.names if names is None else names)):
            pass

    def save_compiled(self, directory: PathLike[str] | str, names: Sequence[str] | None = None) -> None:
        """Writes keys and values of prompts, a safetensors file each, tied to the model's weights."""
        for name in self.names if names is None else names:
            with self.use([name]) as view:
                if view.compiled is None:
                    raise ValueError(f"prompt {name!r} is not compiled: {self.uncompiled or 'the budget is too small'}")
                first, count = view.prefixes[0]
                storage.save(
                    Path(directory) / f"{name}.safetensors",
                    view.compiled[:, :, first : first + count],
                    self[name],
                    self.model.base_model,
                )

    def load_compiled(self, directory: PathLike[str] | str) -> list[str]:
        """Takes keys and values from files of :meth:`save_compiled`, and adds prompts the bank does not have.

        Raises:
            ValueError: written for other weights, or for another prompt of this name.
        """
        loaded = []
        with self._lock:
            self._forget_after_a_change()
        for path in sorted(Path(directory).glob("*.safetensors")):
            values, vectors = storage.load(path, self.model.base_model)
            name = path.stem
            layers, two, heads, size = slot_shape(self.model.base_model)
            if values.shape != (layers, two, len(vectors), heads, size) or not torch.isfinite(values).all():
                shape = [layers, two, len(vectors), heads, size]
                raise ValueError(f"{path}: `compiled` must be finite numbers {shape}, got {list(values.shape)}")
            if name not in self:
                self.add(name, vectors)
            elif not torch.equal(self[name].cpu(), vectors):
                raise ValueError(f"{path} was compiled from another prompt than the bank's {name!r}")
            if self.uncompiled is None:
                with self._lock:
                    self._store([self._entries[name]], values)
            loaded.append(name)
        return loaded

    @contextmanager
    def use(self, rows: Sequence[str | None]) -> Iterator[View]:
        """The prompts of a batch's rows, compiled if possible; they are not evicted while the batch runs.

        Raises:
            KeyError: an unknown name.
        """
        with self._lock:
            self._forget_after_a_change()
            entries = {name: self._entry(name) for name in dict.fromkeys(rows) if name is not None}
            for entry in entries.values():
                entry.pins += 1
                entry.used = time.monotonic()
        try:
            compiled, places = self._compiled_places(list(entries.values()))
            deep = frozenset(name for name, entry in entries.items() if entry.deep)
            if deep and compiled is None:
                reason = self.uncompiled or "the budget is too small for all prompts of the batch"
                raise ValueError(f"{', '.join(sorted(deep))}: deep prompts run only compiled: {reason}")
            prefixes = [(0, 0) if name is None else (places[name], len(entries[name])) for name in rows]
            vectors = {name: entry.vectors for name, entry in entries.items()}
            yield View(FastSoftPrompt.frozen(vectors, self.model.prompts), compiled, prefixes, deep)
        finally:
            with self._lock:
                for entry in entries.values():
                    entry.pins -= 1
                    if entry.gone and not entry.pins:
                        self._free(entry)

    def _compiled_places(self, entries: list[Entry]) -> tuple[Tensor | None, dict[str, int]]:
        """The table that a batch reads and each prompt's first slot in it; None if it cannot hold all of them."""
        nowhere = {entry.name: 0 for entry in entries}
        if self.uncompiled is not None:
            return None, nowhere
        missing = [entry for entry in entries if entry.first is None]
        with self._lock:
            self.hits += len(entries) - len(missing)
            self.misses += len(missing)
        if missing:
            with self._compiling:  # another thread may have compiled them meanwhile
                missing = [entry for entry in missing if entry.first is None]
                self._compile(missing)
        with self._lock:
            if any(entry.first is None for entry in entries):
                return None, nowhere
            places = {entry.name: entry.first or 0 for entry in entries}
            table = self._table.tensor
            if self.storage == "device":
                return table, places
            slots: list[int] = []
            at = 0
            for entry in entries:
                slots += range(places[entry.name], places[entry.name] + len(entry))
                places[entry.name], at = at, at + len(entry)
            chosen = table[:, :, torch.tensor(slots, dtype=torch.int64)]
        return chosen.to(self.model.device, non_blocking=True), places

    def _forget_after_a_change(self) -> None:
        """Frees what another state of the model has computed; running batches finish with it."""
        if self.uncompiled is not None:
            return
        state = weights_version(self.model.base_model)
        if state != self._state:
            for name, entry in self._entries.items():
                if entry.first is not None and not entry.deep:
                    self._entries[name] = replace(entry, first=None, pins=0)
                    self._retire(entry)
            self._state = state

    def _compile(self, entries: list[Entry]) -> None:
        runner = self.model.runner
        if not entries or runner is None:
            return
        total = sum(len(entry) for entry in entries)
        if total > self._table.limit:
            return  # more than the budget: they run with their batch
        plain = [entry for entry in entries if not entry.deep]
        try:
            values = compile_prompts(runner, [entry.vectors for entry in plain]) if plain else None
        except Unsupported as error:
            self.stop_compiling(str(error))
            return
        except Exception:
            # A small batch that is known to be good tells whether the model, and not these prompts, is at fault.
            any_prompt = FastSoftPrompt(self.model.prompts.embedding_dim, {"any": 1}, device=self.model.device)
            ids = torch.ones(1, 2, dtype=torch.int64, device=self.model.device)
            self.model.next_token_logits(ids, prompts=any_prompt)
            if runner.unsupported is None:
                raise
            self.stop_compiling(runner.unsupported)
            return
        with self._lock:
            if values is not None:
                self._store(plain, values)
            for entry in entries:
                if entry.deep and self._shape is not None:
                    self._store([entry], layered(entry.vectors, self._shape))

    def stop_compiling(self, reason: str) -> None:
        """Runs prompts with each batch from now on."""
        self.uncompiled = reason
        logger.warning("prompts are not compiled, they run with each batch: %s", reason)

    def _store(self, entries: Sequence[Entry], values: Tensor) -> None:
        """Copies keys and values of prompts into the table; prompts that do not fit stay uncompiled."""
        at = 0
        for entry in entries:
            first = self._allocate(len(entry)) if entry.first is None and not (entry.gone and not entry.pins) else None
            if first is not None:
                self._table.tensor[:, :, first : first + len(entry)] = values[:, :, at : at + len(entry)]
                entry.first = first
            at += len(entry)

    def _allocate(self, count: int) -> int | None:
        """The first of `count` free slots, after evictions if need be; None if running batches hold too many."""
        while (first := self._table.allocate(count)) is None:
            idle = [entry for entry in self._entries.values() if entry.first is not None and not entry.pins]
            if not idle:
                return None
            self._free(min(idle, key=lambda entry: entry.used))
            self.evictions += 1
        return first

    def _free(self, entry: Entry) -> None:
        if entry.first is not None:
            self._table.release(entry.first, len(entry))
            entry.first = None

    def _retire(self, entry: Entry) -> None:
        entry.gone = True
        if not entry.pins:
            self._free(entry)

    def _entry(self, name: str) -> Entry:
        with self._lock:
            if name not in self._entries:
                some = ", ".join(list(self._entries)[:5])
                raise KeyError(f"no prompt {name!r} in the bank of {len(self._entries)} ({some}, ...)")
            return self._entries[name]
