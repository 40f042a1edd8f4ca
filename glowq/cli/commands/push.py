"""`glowq push`: upload a folder that glowq saved to the Hub."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from ..options import JsonOption
from ..output import grid, session
from ..output import note as print_note

__all__ = ["push"]


def push(
    folder: Annotated[str, typer.Argument(metavar="OUT", help="Folder of a correction, a full model or an export.")],
    repository: Annotated[str, typer.Argument(metavar="NAME", help="Repository, org/name; created if missing.")],
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="ORG/BASE[@REV]", help="The base's Hub name, if OUT was made on a folder of this machine."
        ),
    ] = None,
    private: Annotated[bool, typer.Option("--private", help="Make a new repository private.")] = False,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request instead.")] = False,
    revision: Annotated[str | None, typer.Option(metavar="BRANCH", help="Branch; created if missing.")] = None,
    commit_message: Annotated[str | None, typer.Option(metavar="TEXT", help="First line of the commit.")] = None,
    token: Annotated[
        str | None,
        typer.Option(metavar="TOKEN", help="Hub token; by default HF_TOKEN, or the token that `hf auth login` stored."),
    ] = None,
    json: JsonOption = False,
) -> None:
    """Push a folder that glowq saved to the Hub, in one commit, with its model card.

    \b
    Examples:
      glowq push corrected org/model-glowq
      glowq push corrected org/model-glowq --base-model org/model@v1.0 --private
      glowq push full org/model-nf4-glowq --create-pr
    """
    name, _, base_revision = (base_model or "").partition("@")
    if create_pr and revision is not None:
        raise typer.BadParameter("--create-pr goes to the main branch: leave out --revision.")
    with session(json) as show:
        from ...artifact.hub.push import push as push_folder

        result = push_folder(
            folder,
            repository,
            base_model=name or None,
            base_revision=base_revision or None,
            private=private or None,
            create_pr=create_pr,
            revision=revision,
            commit_message=commit_message,
            token=token,
        )
        for note in _notes(result, base_model):
            print_note(note)
        # The result leaves out the command line, because it may hold the token.
        show(result, lambda: _table(result))


def _notes(result: dict[str, Any], named: str | None) -> list[str]:
    base, notes = result["base_model"], []
    if named is not None and base is not None and not base["compared"]:
        notes.append(
            f"the weights of {base['name']} were not compared with those of the local base, which is gone or has other "
            "files. If they differ, loading fails at the check of the fingerprint. Load it once yourself."
        )
    if base is not None and base["gated"]:
        notes.append(f"{base['name']} is gated: everybody who loads this needs access to it.")
    if base is None and result["kind"] == "full":
        notes.append(
            "its base is a folder of this machine, or is not on the Hub any more, so that the card names no base; "
            "--base-model adds one."
        )
    if result["left_out"]:
        notes.append(f"not pushed, because glowq did not write these files: {', '.join(result['left_out'])}")
    return notes


def _table(result: dict[str, Any]) -> Any:
    base = result["base_model"]
    return grid(
        {
            "pushed": f"{result['kind']}, {len(result['files'])} files, {result['bytes']:,} bytes",
            "to": f"{result['repository']}, {result['revision']}",
            **({} if base is None else {"base": f"{base['name']} at {base['revision']}"}),
            "commit": result["commit"],
            **({"pull request": result["pull_request"]} if result["pull_request"] else {}),
        }
    )
