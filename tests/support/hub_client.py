"""Functions that the tests of the Hub run in separate processes, because huggingface_hub reads its endpoint at import.

`python -m support.hub_client FUNCTION FOLDER` runs one of the functions below and prints its result as JSON.
"""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, ModelCard
from safetensors.torch import load_file
from typer.testing import CliRunner

import glowq
from glowq.artifact.hub.push import push
from glowq.cli.app import app
from glowq.models.loading import load_config
from support.tiny import gap, load

BASE = {"base_model": "me/base"}


def refusal(call: Callable[[], Any]) -> list[str]:
    """Return the class name and the message of the error that a call raises."""
    try:
        return ["accepted", str(call())]
    except Exception as error:
        return [type(error).__name__, str(error)]


def differs(folder: Path, name: str, **options: Any) -> float:
    """Return the largest difference between the logits of a loaded model and those of the model that was saved."""
    return gap(load(name, **options), load_file(folder / "logits.safetensors")["logits"])


def with_local_path(folder: Path) -> Path:
    """Copy the correction, with a card that names a folder of this machine."""
    target = Path(shutil.copytree(folder / "correction", folder / "private" / "correction"))
    with (target / "README.md").open("a") as card:
        card.write(f"Made with {target.parent}/notes.txt")
    return target


def ranks(model: Any) -> list[int]:
    return sorted({group["rank"] for group in model.config.quantization_config.groups.values()})


def pushing(folder: Path) -> dict[str, Any]:
    """Push as a user with a token: first the calls that are refused, then the calls that succeed."""
    found: dict[str, Any] = {}
    correction, api = glowq.Correction.from_pretrained(folder / "correction"), HfApi()
    to: Callable[..., str] = correction.push_to_hub
    for name, call in {
        "local base": lambda: to("me/correction"),
        "absent base": lambda: to("me/correction", base_model="me/absent"),
        "absent base revision": lambda: to("me/correction", **BASE, base_revision="v9"),
        "another base": lambda: to("me/correction", base_model="me/another"),
        "a local path": lambda: push(with_local_path(folder), "me/correction", **BASE),
        "the base itself": lambda: to("me/base", **BASE),
        "revision of nothing": lambda: to("me/correction", base_revision="v1"),
        "somebody else's": lambda: to("other/theirs", **BASE),
        "somebody else's namespace": lambda: to("other/new", **BASE),
        "no name": lambda: to("me/a name", **BASE),
        "bad token": lambda: to("me/correction", base_model="other/open", token="hf_wrong"),
        "absent pull request": lambda: to("me/another", **BASE, revision="refs/pr/9"),
        "no folder": lambda: push(folder / "absent", "me/correction"),
        "no result": lambda: push(folder / "source", "me/correction"),
        "pickle": lambda: push(folder / "pickled", "me/correction"),
        "damaged": lambda: push(folder / "damaged", "me/correction", **BASE),
        "damaged card": lambda: push(folder / "scribbled", "me/scribbled", **BASE),
        "adapter on a local base": lambda: push(folder / "adapter", "me/adapter"),
        "base of an export": lambda: push(folder / "export", "me/export", **BASE),
        "interrupted": lambda: to("me/correction", **BASE),
    }.items():
        found[name] = refusal(call)
    found["after interruption"] = api.list_repo_files("me/correction")
    found["first"] = to("me/correction", **BASE, base_revision="v1")
    found["again"] = to("me/correction", **BASE, base_revision="v1")
    found["small"] = correction.cut(rank=2).push_to_hub("me/correction", **BASE, revision="small")
    correction.save_pretrained(folder / "saved" / "by-name", push_to_hub=True, **BASE, base_revision="v1")
    found["pull request"] = to("other/theirs", **BASE, create_pr=True, commit_message="Better")
    found["export"] = push(folder / "export", "export")
    found["edited"] = push(folder / "edited", "me/edited", base_model="other/gated")
    runner = CliRunner()
    done = runner.invoke(app, ["push", str(folder / "full"), "me/full", "--private", "--json"])
    found["full"], found["note"] = json.loads(done.stdout), done.stderr
    done = runner.invoke(
        app, ["push", str(folder / "odd"), "me/full", "--base-model", "me/base@v1", "--revision", "odd"]
    )
    found["odd"] = [done.exit_code, done.stdout, done.stderr]
    done = runner.invoke(app, ["push", str(folder / "correction"), "me/new"])
    found["one line"] = [done.exit_code, done.stdout, done.stderr]
    done = runner.invoke(app, ["push", str(folder / "full"), "me/new", "--create-pr", "--revision", "v1"])
    found["wrong usage"] = [done.exit_code, done.stdout, done.stderr]
    load(folder / "full").push_to_hub("me/transformers")
    for name in ("me/correction", "me/full", "me/edited"):
        ModelCard.load(name).validate()
    return found


def reading(folder: Path) -> dict[str, Any]:
    """Read as a user without a token and with an empty cache."""
    take = glowq.Correction.from_pretrained
    return {
        "no token": refusal(lambda: take(folder / "correction").push_to_hub("me/new", **BASE, base_revision="v1")),
        "bad token": refusal(lambda: take("me/edited", token="hf_wrong")),
        "absent": refusal(lambda: take("me/absent")),
        "absent revision": refusal(lambda: take("me/correction", revision="v9")),
        "private": refusal(lambda: take("me/full")),
        "gated": refusal(lambda: take("other/gated")),
        "gated base": refusal(lambda: load("other/on-gated")),
        "pickles": refusal(lambda: load("other/pickled")),
        "base in pickles": refusal(lambda: load("other/on-pickled")),
        "main": differs(folder, "me/correction"),
        "pinned": ranks(load("me/correction", revision=(folder / "commit").read_text())),
        "branch": sorted(set(take("me/correction", revision="small").ranks.values())),
        "full": differs(folder, "me/full", token="hf_me"),
        "transformers": differs(folder, "me/transformers"),
        "code": differs(folder, "other/code"),
        "code, read": load_config("other/code").model_type,
    }


def offline(folder: Path) -> dict[str, Any]:
    """Read with HF_HUB_OFFLINE set, from the cache that `reading` filled."""
    return {
        "main": differs(folder, "me/correction"),
        "pinned": ranks(load("me/correction", revision=(folder / "commit").read_text())),
        **unreachable(folder),
    }


def unreachable(folder: Path) -> dict[str, Any]:
    """Read without a network, from the cache that `reading` filled."""
    take = glowq.Correction.from_pretrained
    return {
        "cached": sorted(set(take("me/correction").ranks.values())),
        "not cached": refusal(lambda: take("me/edited")),
        "not to be asked for": refusal(lambda: take("me/edited", local_files_only=True)),
        "push": refusal(lambda: push(folder / "full", "me/new")),
    }


if __name__ == "__main__":
    print(json.dumps(globals()[sys.argv[1]](Path(sys.argv[2]))))
