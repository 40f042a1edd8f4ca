"""A killed `glowq push`: the repository is as before or complete, and the next push completes it."""

from __future__ import annotations

import os
import shutil
import signal
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

from support.hub_server import HubServer, Repository
from support.tiny import CHEAP, corrected, tiny_llama

KILLS = 14  # more than the requests of one push


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("push")
    _, correction = corrected(tiny_llama(folder / "base"), "nf4", **CHEAP)
    correction.config.base_model = {**(correction.config.base_model or {}), "name": "me/base"}
    correction.save_pretrained(folder / "correction")
    return folder


@pytest.fixture
def hub(folder: Path) -> Iterator[HubServer]:
    with HubServer(part_bytes=1 << 14) as server:
        server.repositories["me/base"] = Repository()
        server.publish("me/base", folder / "base")
        yield server


class Killing(list[str]):
    """The server's list of requests, which kills the client at one of them.

    Attributes:
        client: the process; None kills nobody.
    """

    def __init__(self, at: int) -> None:
        super().__init__()
        self.at, self.client = at, None

    client: subprocess.Popen[str] | None

    def append(self, request: str) -> None:
        super().append(request)
        if len(self) == self.at and self.client is not None:
            self.client.kill()


def push(hub: HubServer, folder: Path, home: Path, kill_at: int = 0) -> tuple[int, int]:
    """Push the correction, and return the status of the command and the number of its requests."""
    settings = {"HF_HOME": str(home), "HF_ENDPOINT": hub.url, "HF_TOKEN": "hf_me", "HF_HUB_DISABLE_XET": "1"}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    hub.requests = requests = Killing(kill_at)
    command = [sys.executable, "-m", "glowq", "push", str(folder / "correction"), "me/correction"]
    client = subprocess.Popen(
        command, env={**kept, **settings}, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    requests.client = client
    _, stderr = client.communicate(timeout=120)
    assert client.returncode in (0, -signal.SIGKILL), stderr
    return client.returncode, len(requests)


def published(folder: Path) -> set[str]:
    """The files that a push of the correction uploads."""
    return {file.name for file in (folder / "correction").iterdir()} - {"glowq_manifest.json"}


@pytest.mark.parametrize("at", [pytest.param(k, marks=[] if k == 5 else [pytest.mark.long]) for k in range(1, KILLS)])
@pytest.mark.parametrize("earlier", [False, pytest.param(True, marks=pytest.mark.long)], ids=["new", "again"])
def test_a_push_that_is_killed(at: int, earlier: bool, hub: HubServer, folder: Path, tmp_path: Path) -> None:
    before = ""
    if earlier:
        shutil.copytree(folder / "correction", tmp_path / "earlier")
        (tmp_path / "earlier" / "glowq_manifest.json").unlink()
        (tmp_path / "earlier" / "README.md").write_text("an earlier card\n")
        before = hub.publish("me/correction", tmp_path / "earlier")
    push(hub, folder, tmp_path / "home", at)
    repository = hub.repositories.get("me/correction", Repository())
    now = set(repository.at()) if repository.refs else set()
    # The Hub itself puts .gitattributes into a repository that it creates.
    untouched = repository.refs.get("main") == before if earlier else now <= {".gitattributes"}
    assert untouched or published(folder) <= now
    status, _ = push(hub, folder, tmp_path / "home")
    assert status == 0
    found = hub.repositories["me/correction"].at()
    assert published(folder) <= set(found)
    for name in ("glowq.safetensors", "tokenizer.json"):
        assert found[name] == (folder / "correction" / name).read_bytes()
