"""Prompts to the Hub: a repository holds one prompt, or a folder for each of several."""

from __future__ import annotations

import json
import logging
import os
import re
import shutil
import tempfile
from os import PathLike
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..base.hub import plain_errors
from ..base.locations import located
from ..tasks.task import TASK_FILE
from .base_identity import one_base
from .card import CARD_FILE, card_text, is_generated, is_ours, several_text
from .card_facts import CardFacts, card_facts, is_local, public_name, without_folders
from .multitask_files import split_task
from .peft_files import CONFIG_FILE, WEIGHTS_FILE, prompts_by_name
from .run_files import COMPOSITION_FILE

if TYPE_CHECKING:
    from huggingface_hub import CommitInfo, HfApi

logger = logging.getLogger("softprompt_fast")

BASE_KEYS = {CONFIG_FILE: "base_model_name_or_path", TASK_FILE: "model"}
"""Where a prompt's files name its base model."""
TOKENIZER, TOKENIZER_OPTIONS = "tokenizer_name_or_path", "tokenizer_kwargs"
"""PEFT's fields of the tokenizer of a prompt that began as words. It is that of the base model."""


def push_to_hub(
    folder: PathLike[str] | str,
    repo_id: str,
    *,
    commit_message: str | None = None,
    commit_description: str | None = None,
    private: bool | None = None,
    token: str | bool | None = None,
    revision: str | None = None,
    create_pr: bool = False,
    base_model: str | None = None,
) -> CommitInfo:
    """Uploads the prompt of a folder, or each prompt of a folder of them, as one commit. The repository is made if new.

    One prompt lies in the repository itself, so that PEFT finds it; several lie in a folder each. Uploaded are the
    adapter's two files, ``task.json``, ``composition.json`` and the model card. Data, checkpoints and profiles stay
    here.

    A card that was changed by hand is kept: one in the folder is uploaded, but for paths of the base model, and one on
    the Hub is not replaced by a card that was written here. The form that PEFT leaves unfilled counts as no card.

    Args:
        folder: an adapter folder, a folder of them, or the name of a version in the registry.
        repo_id: such as ``user/repo``.
        private: None: as the owner's settings say. Only for a new repository.
        token: None: the one of the Hub's login.
        revision: branch; made if new. None: the main one.
        create_pr: propose the commit instead of making it.
        base_model: Hub name of the base model, if the prompt was tuned on a local folder.

    Returns:
        The commit: the address as a text, and ``oid``, ``pr_url``, ...

    Raises:
        FileNotFoundError: no prompt in the folder.
        ValueError: the prompts were tuned on several base models, or the repository holds one prompt and several are
            pushed, or the other way round.
        OSError: the Hub does not answer or refuses.
    """
    from huggingface_hub import HfApi

    folders = list(dict.fromkeys(split_task(path)[0] for path in prompts_by_name(located(folder)).values()))
    if base_model is None:
        one_base(folders)
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as scratch, plain_errors(repo_id, revision):
        repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
        if revision is not None and not revision.startswith("refs/pr/"):
            api.create_branch(repo_id, branch=revision, exist_ok=True)
        _check_layout(api, repo_id, revision, len(folders))
        staged = Path(scratch) / "files"
        _stage(folders, staged, repo_id, base_model)
        if is_ours((staged / CARD_FILE).read_text()) and not _replaceable(api, repo_id, revision, Path(scratch)):
            logger.warning("%s keeps its own %s, which was changed by hand", repo_id, CARD_FILE)
            (staged / CARD_FILE).unlink()
        names = ", ".join(path.resolve().name for path in folders)
        return api.upload_folder(
            repo_id=repo_id,
            folder_path=staged,
            commit_message=commit_message or f"Upload prompt {names}",
            commit_description=commit_description,
            revision=revision,
            create_pr=create_pr,
        )


def _check_layout(api: HfApi, repo_id: str, revision: str | None, count: int) -> None:
    """Refuses a push after which the repository's own prompt would hide those in folders, or an old one new ones."""
    from huggingface_hub.errors import RevisionNotFoundError

    try:
        present = api.list_repo_files(repo_id, revision=revision)
    except RevisionNotFoundError:
        return
    single = WEIGHTS_FILE in present
    several = any(file.count("/") == 1 and file.endswith(f"/{WEIGHTS_FILE}") for file in present)
    if (single and count > 1) or (several and count == 1):
        held = "one prompt in the repository itself" if single else "prompts in folders"
        got = "several prompts" if count > 1 else "one prompt"
        raise ValueError(f"{repo_id} on the Hub holds {held}, got {got} to push; choose another repository or branch")


def _stage(folders: list[Path], target: Path, repo_id: str, base_model: str | None) -> None:
    """Copies what is uploaded, with the repository's name in the cards and without this machine's paths."""
    facts = []
    for folder in folders:
        subfolder = folder.resolve().name if len(folders) > 1 else None
        own = target / (subfolder or "")
        own.mkdir(parents=True)
        shutil.copyfile(folder / WEIGHTS_FILE, own / WEIGHTS_FILE)
        if (folder / COMPOSITION_FILE).is_file():
            shutil.copyfile(folder / COMPOSITION_FILE, own / COMPOSITION_FILE)
        names: dict[str, str] = {}
        for file, key in BASE_KEYS.items():
            if (folder / file).is_file():
                values = json.loads((folder / file).read_text())
                names |= _publish(values, key, base_model)
                text = json.dumps(values, indent=2, sort_keys=file == CONFIG_FILE, ensure_ascii=False)
                (own / file).write_text(text + "\n", encoding="utf-8")
        facts.append(card_facts(folder).pushed(repo_id, subfolder, base_model))
        _stage_card(folder / CARD_FILE, own / CARD_FILE, facts[-1], names)
    if facts[0].base_is_local:
        logger.warning(
            "others cannot find the base model %r by this name: give the one it has on the Hub (`base_model`, "
            "--base-model)",
            facts[0].base or "",
        )
    if len(folders) > 1:
        (target / CARD_FILE).write_text(several_text(facts, repo_id), encoding="utf-8")


def _stage_card(source: Path, target: Path, facts: CardFacts, names: dict[str, str]) -> None:
    """Writes the card, or copies one that was changed by hand, with public names for paths of this machine."""
    text = source.read_text(encoding="utf-8") if source.is_file() else None
    if text is None or is_generated(text):
        text = card_text(facts)
    else:
        for path in sorted(names, key=len, reverse=True):  # a path may begin with another
            name = names[path].replace("\\", r"\\")
            text = re.sub(rf"(?<![\w.-]){re.escape(path)}(?![\w-])", name, text)
    target.write_text(text, encoding="utf-8")


def _publish(values: dict[str, Any], key: str, base_model: str | None) -> dict[str, str]:
    """Gives a file's values public names of the base model and its tokenizer; these names by the absolute paths."""
    names = {}
    for field in (key, TOKENIZER):
        model = values.get(field)
        if isinstance(model, str) and is_local(model):
            values[field] = base_model or public_name(model)
            path = Path(os.path.expanduser(model))
            if path.is_absolute() and path.name:
                names[model] = values[field]
    if base_model is not None:
        values[key] = base_model
    if TOKENIZER_OPTIONS in values:
        values[TOKENIZER_OPTIONS] = without_folders(values[TOKENIZER_OPTIONS])
    return names


def _replaceable(api: HfApi, repo_id: str, revision: str | None, scratch: Path) -> bool:
    """Whether the repository has no card, or one that no person wrote or changed."""
    from huggingface_hub.errors import EntryNotFoundError, RevisionNotFoundError

    try:
        file = api.hf_hub_download(repo_id, CARD_FILE, revision=revision, local_dir=scratch / "present")
    except (EntryNotFoundError, RevisionNotFoundError):
        return True
    return is_generated(Path(file).read_text(encoding="utf-8"))
