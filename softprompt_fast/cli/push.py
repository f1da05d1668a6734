"""``push``: uploads prompts to the Hub."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from .output import console

Private = Annotated[
    bool | None,
    typer.Option(
        "--private/--public",
        help="Who sees a new repository. By default as its owner's settings say.",
        show_default=False,
    ),
]


def push(
    folder: Annotated[
        Path, typer.Argument(help="Folder of a prompt or of several, or a version such as NAME@production.")
    ],
    repository: Annotated[str, typer.Argument(help="Repository on the Hub: USER/NAME. It is made if it is new.")],
    message: Annotated[str | None, typer.Option("--message", help="Message of the commit.")] = None,
    private: Private = None,
    revision: Annotated[str | None, typer.Option(help="Branch. It is made if it is new.")] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Propose the commit instead of making it.")] = False,
    base_model: Annotated[
        str | None, typer.Option(help="Hub name of the base model, for prompts that were tuned on a local folder.")
    ] = None,
) -> None:
    """Uploads a prompt, its task and its model card to the Hub. Data, checkpoints and profiles are not uploaded."""
    from ..prompts.hub_upload import push_to_hub

    commit = push_to_hub(
        folder,
        repository,
        commit_message=message,
        private=private,
        revision=revision,
        create_pr=create_pr,
        base_model=base_model,
    )
    console.print(f"uploaded to {commit.pr_url or commit}", highlight=False, markup=False, soft_wrap=True)
    named = repository if revision is None else f"{repository}@{revision}"
    console.print(
        f"use it:\n  softprompt-fast predict --prompt {named} --data ...", highlight=False, markup=False, soft_wrap=True
    )
