"""Pushing to the Hub and reading back over HTTP, with the real client and a local server that has the Hub's API."""

from __future__ import annotations

import json
import os
import re
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
from huggingface_hub import ModelCard

from glowq.utils.manifest import MANIFEST
from glowq.utils.output import EXPORT_MANIFEST
from support.fresh_process import run_python
from support.hub_folders import build
from support.hub_server import HubServer, Repository

TESTS = Path(__file__).parents[1]

pytestmark = pytest.mark.slow

NOWHERE = "http://127.0.0.1:1"  # no server listens at this address


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("hub")
    build(folder)
    return folder


@pytest.fixture(scope="module")
def hub(folder: Path) -> Iterator[HubServer]:
    """A Hub with a base model and with repositories of other users."""
    with HubServer() as server:
        server.repositories["me/base"] = Repository()
        server.repositories["me/base"].refs["v1"] = server.publish("me/base", folder / "source")
        for name in ("me/another", "other/code", "other/on-gated", "other/on-pickled", "other/pickled-base"):
            server.publish(name, folder / name.partition("/")[2])
        server.publish("other/pickled", folder / "pickled-full")
        server.publish("other/theirs", folder / "another")
        server.publish("other/open", folder / "source")
        server.publish("other/gated", folder / "source", gated=True)
        yield server


def steps(name: str, folder: Path, home: Path, **settings: str) -> Any:
    """Run a function of `hub_client` in a separate process and return the object that it prints."""
    fresh = {
        "HF_HOME": str(home),
        "HF_HUB_DISABLE_XET": "1",
        "HF_HUB_OFFLINE": "0",
        "OMP_NUM_THREADS": "1",
        "PYTHONPATH": str(TESTS),
    }
    path = {"PYTHONPATH": os.pathsep.join([str(TESTS), os.environ.get("PYTHONPATH", "")])}
    kept = {key: value for key, value in os.environ.items() if not key.startswith("HF_")}
    done = run_python("-m", "support.hub_client", name, folder, env={**kept, **fresh, **path, **settings})
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.fixture(scope="module")
def pushed(hub: HubServer, folder: Path, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    hub.cuts, hub.expired = 1, 1
    return steps("pushing", folder, tmp_path_factory.mktemp("home"), HF_ENDPOINT=hub.url, HF_TOKEN="hf_me")


@pytest.fixture(scope="module")
def read(hub: HubServer, pushed: dict[str, Any], folder: Path, home: Path) -> dict[str, Any]:
    """Results of reading after the base repository changed: only the stored commit gives the right base model."""
    hub.publish("me/base", folder / "another")
    (folder / "commit").write_text(hub.repositories["me/correction"].refs["small"])
    return steps("reading", folder, home, HF_ENDPOINT=hub.url)


@pytest.fixture(scope="module")
def home(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("reader")


@pytest.fixture(scope="module")
def cached(hub: HubServer, read: dict[str, Any], folder: Path, home: Path) -> list[dict[str, Any]]:
    """Results of reading without the Hub: with HF_HUB_OFFLINE set, and with a server that cannot be reached."""
    settings = {"offline": {"HF_ENDPOINT": hub.url, "HF_HUB_OFFLINE": "1"}, "unreachable": {"HF_ENDPOINT": NOWHERE}}
    with ThreadPoolExecutor() as pool:
        return list(pool.map(lambda name: steps(name, folder, home, **settings[name]), settings))


def files(hub: HubServer, name: str, revision: str = "main") -> dict[str, bytes]:
    return hub.repositories[name].at(revision)


def quantization(hub: HubServer, name: str, revision: str = "main") -> dict[str, Any]:
    """Return the quantization config in config.json of a pushed correction."""
    found: dict[str, Any] = json.loads(files(hub, name, revision)["config.json"])["quantization_config"]
    return found


class TestWhatIsPushed:
    def test_every_file_and_only_the_base_and_the_card_are_changed(
        self, hub: HubServer, pushed: dict[str, Any], folder: Path
    ) -> None:
        found = files(hub, "me/correction")
        local = {file.name: file.read_bytes() for file in (folder / "correction").iterdir()}
        local.pop(MANIFEST)  # its digests would not fit the changed files
        assert set(found) == {*local, ".gitattributes"}
        others = set(local) - {"config.json", "README.md", "budgets.png"}
        others.remove("tokenizer_config.json")  # transformers records in it how the tokenizer was loaded
        assert all(local[name] == found[name] for name in others)
        mine, theirs = (json.loads(side["config.json"]) for side in (local, found))
        stored = theirs["quantization_config"]["base_model"]
        assert stored["name"] == "me/base"
        assert stored["revision"] == hub.repositories["me/base"].refs["v1"]
        mine["quantization_config"]["base_model"].update(name=stored["name"], revision=stored["revision"])
        assert mine == theirs

    def test_one_commit_or_none(self, hub: HubServer, pushed: dict[str, Any]) -> None:
        assert pushed["after interruption"] == [".gitattributes"]
        repository = hub.repositories["me/correction"]
        assert repository.messages[repository.refs["main"]] == "Upload glowq correction"
        assert len(repository.commits) == 3  # the first commit of the repository, this one, and one on a branch
        assert pushed["first"] == pushed["again"] == f"{hub.url}/me/correction/commit/{repository.refs['main']}"

    def test_a_branch(self, hub: HubServer, pushed: dict[str, Any]) -> None:
        ranks = {group["rank"] for group in quantization(hub, "me/correction", "small")["groups"].values()}
        assert ranks == {2}
        assert pushed["small"].endswith(hub.repositories["me/correction"].refs["small"])

    def test_while_saving(self, hub: HubServer, pushed: dict[str, Any], folder: Path) -> None:
        assert quantization(hub, "me/by-name") == quantization(hub, "me/correction")
        assert (folder / "saved" / "by-name" / "glowq.safetensors").is_file()

    def test_a_pull_request_leaves_the_main_branch(self, hub: HubServer, pushed: dict[str, Any], folder: Path) -> None:
        repository = hub.repositories["other/theirs"]
        assert pushed["pull request"] == f"{hub.url}/other/theirs/discussions/1"
        assert set(repository.at()) == {file.name for file in (folder / "another").iterdir()}
        assert "glowq.safetensors" in repository.at("refs/pr/1")
        assert repository.messages[repository.refs["refs/pr/1"]] == "Better"

    def test_a_model_in_one_piece_in_parts(self, hub: HubServer, pushed: dict[str, Any], folder: Path) -> None:
        assert hub.repositories["me/full"].private
        assert files(hub, "me/full")["model.safetensors"] == (folder / "full" / "model.safetensors").read_bytes()
        assert any(request.startswith("POST /complete/") for request in hub.requests)
        result = pushed["full"]
        sizes = {name: len(data) for name, data in files(hub, "me/full").items() if name != ".gitattributes"}
        assert result["files"] == sizes
        assert result["bytes"] == sum(sizes.values())
        assert (result["kind"], result["repository"], result["revision"]) == ("full", "me/full", "main")
        assert result["base_model"] is None
        assert "its base is a folder of this machine" in pushed["note"]
        assert result["oid"] == hub.repositories["me/full"].refs["main"]

    def test_weights_of_an_earlier_push_go_and_strange_files_stay_at_home(
        self, hub: HubServer, pushed: dict[str, Any]
    ) -> None:
        status, stdout, note = pushed["odd"]
        assert status == 0
        assert "me/full, odd" in stdout
        odd = [".env", "credentials.json", "diary.txt", "modeling.py", "notes.log", "private/config.json"]
        assert note == f"glowq: note: not pushed, because glowq did not write these files: {', '.join(odd)}\n"
        found = files(hub, "me/full", "odd")
        assert {"glowq.safetensors", "LICENSE"} <= set(found)
        assert not {"model.safetensors", *odd} & set(found)

    def test_an_export_is_what_its_manifest_names(self, hub: HubServer, pushed: dict[str, Any], folder: Path) -> None:
        found = files(hub, "me/export")
        assert set(found) == {".gitattributes", EXPORT_MANIFEST, "model.onnx"}
        assert found["model.onnx"] == (folder / "export" / "model.onnx").read_bytes()
        assert pushed["export"]["left_out"] == ["left.txt"]

    def test_the_folder_stays_as_it_is(self, pushed: dict[str, Any], folder: Path) -> None:
        stored = json.loads((folder / "correction" / "config.json").read_text())["quantization_config"]
        assert stored["base_model"]["name"] == str(folder / "source")


class TestCard:
    """The process that pushed the cards also passed each through `ModelCard.validate`."""

    def test_it_knows_its_repository_its_base_and_that_ones_license(
        self, hub: HubServer, pushed: dict[str, Any]
    ) -> None:
        card = ModelCard(files(hub, "me/correction")["README.md"].decode())
        assert card.data.base_model == "me/base"
        stated = card.data.to_dict()
        assert {key: stated[key] for key in ("license", "license_name", "license_link")} == {
            "license": "other",
            "license_name": "tiny",
            "license_link": "https://example.org",
        }
        assert 'from_pretrained("me/correction")' in card.text
        assert f"`me/base` at revision `{hub.repositories['me/base'].refs['v1']}`" in card.text

    def test_a_model_saved_by_transformers_gets_one(self, hub: HubServer, pushed: dict[str, Any], folder: Path) -> None:
        assert not (folder / "full" / "README.md").exists()
        card = ModelCard(files(hub, "me/full")["README.md"].decode())
        assert 'from_pretrained("me/full")' in card.text
        assert card.data.license == "other"
        assert "budgets.png" in files(hub, "me/full")

    def test_what_somebody_wrote_is_kept(self, hub: HubServer, pushed: dict[str, Any]) -> None:
        card = ModelCard(files(hub, "me/edited")["README.md"].decode())
        assert card.text == "My own words.\n"
        assert (card.data.language, card.data.base_model, card.data.license) == ("code", "other/gated", "other")
        assert pushed["edited"]["base_model"]["gated"] is True


class TestReadBack:
    def test_every_form_gives_the_same_logits(self, read: dict[str, Any]) -> None:
        assert [read["main"], read["full"], read["transformers"]] == [0.0, 0.0, 0.0]

    def test_a_commit_and_a_branch(self, read: dict[str, Any]) -> None:
        assert read["pinned"] == read["branch"] == [2]

    def test_from_the_cache(self, cached: list[dict[str, Any]]) -> None:
        offline, unreachable = cached
        assert offline["main"] == 0.0
        assert offline["pinned"] == [2]
        assert offline["cached"] == unreachable["cached"] == [8]

    def test_no_code_of_a_repository_runs(self, read: dict[str, Any], folder: Path) -> None:
        assert read["code"] == 0.0
        assert read["code, read"] == "llama"
        assert not (folder / "ran").exists()


class TestRefused:
    @pytest.mark.parametrize(
        ("step", "kind", "message"),
        [
            ("local base", "ConfigError", r"which nobody else can load.*--base-model org/base"),
            ("absent base", "ModelNotFoundError", r"'me/absent' is neither a folder nor a Hub repository .*auth login"),
            ("absent base revision", "ModelNotFoundError", r"me/base has no branch, tag or commit 'v9'"),
            ("another base", "HubError", r"me/another at \w{40} is another model than the base .*model\.safetensors"),
            ("the base itself", "ConfigError", "me/base is the base itself, which would be replaced"),
            ("a local path", "ConfigError", r"README\.md names .*private, a folder of this machine"),
            ("revision of nothing", "ConfigError", "base_revision is a revision of base_model"),
            ("somebody else's", "HubError", "does not let you write other/theirs.*--create-pr"),
            ("somebody else's namespace", "HubError", "does not let you write other/new"),
            ("no name", "HubError", "'me/a name' is no name that a Hub repository can have: expected"),
            ("bad token", "HubError", "needs a valid token; yours is missing or expired: `hf auth login`"),
            ("absent pull request", "ModelNotFoundError", "me/another has no branch, tag or commit 'refs/pr/9'"),
            ("no folder", "ModelNotFoundError", "absent is no folder; give one that"),
            ("no result", "ModelNotFoundError", "source holds nothing that glowq saved; give a folder that"),
            ("pickle", "PickleRefusedError", r"optimizer\.pt is a pickle"),
            ("damaged", "CorrectionError", "is corrupt or truncated"),
            ("damaged card", "HubError", r"README\.md cannot be read .*; repair or remove it"),
            ("adapter on a local base", "ConfigError", "which nobody else can load. Push the correction, then export"),
            ("base of an export", "ConfigError", "is an export: push the correction with base_model"),
            ("interrupted", "HubError", "was refused or lost .*all files of the upload or none.*Run the same command"),
        ],
    )
    def test_pushing(self, pushed: dict[str, Any], step: str, kind: str, message: str) -> None:
        check(pushed[step], kind, message)

    @pytest.mark.parametrize(
        ("step", "kind", "message"),
        [
            ("no token", "HubError", "needs a valid token; yours is missing or expired: `hf auth login`"),
            ("bad token", "HubError", "needs a valid token; yours is missing or expired: `hf auth login`"),
            ("absent", "ModelNotFoundError", "'me/absent' is neither a folder nor a Hub repository .*auth login"),
            ("absent revision", "ModelNotFoundError", "me/correction has no branch, tag or commit 'v9'"),
            ("private", "ModelNotFoundError", "'me/full' is neither a folder nor a Hub repository .*for a private one"),
            ("gated", "HubError", "other/gated is gated: ask for access at http"),
            ("gated base", "HubError", "other/gated is gated: ask for access at http"),
            ("pickles", "PickleRefusedError", r"as pytorch_model\.bin, a pickle"),
            (
                "base in pickles",
                "PickleRefusedError",
                r"^other/pickled-base stores its weights as pytorch_model\.bin",
            ),
        ],
    )
    def test_reading(self, read: dict[str, Any], step: str, kind: str, message: str) -> None:
        check(read[step], kind, message)

    @pytest.mark.parametrize(
        ("step", "offline", "unreachable"),
        [
            ("not cached", "HF_HUB_OFFLINE is set: load it once", f"not in the cache, and {NOWHERE} cannot be reached"),
            (
                "not to be asked for",
                "local_files_only was asked for: load it",
                "local_files_only was asked for: load it",
            ),
            ("push", "HF_HUB_OFFLINE is set, so that nothing can be pushed", f"to {NOWHERE} was refused or lost"),
        ],
    )
    def test_without_the_hub(self, cached: list[dict[str, Any]], step: str, offline: str, unreachable: str) -> None:
        for found, message in zip(cached, (offline, unreachable), strict=True):
            check(found[step], "ModelNotFoundError|HubError", message)

    def test_on_the_command_line(self, pushed: dict[str, Any]) -> None:
        status, stdout, stderr = pushed["one line"]
        assert (status, stdout, stderr.count("\n")) == (1, "", 1)
        assert stderr.startswith("glowq: error: the base of this correction is the local folder")
        status, stdout, stderr = pushed["wrong usage"]
        assert (status, stdout) == (2, "")
        assert "leave out --revision" in stderr

    def test_nothing_was_created_for_what_was_refused(self, hub: HubServer, pushed: dict[str, Any]) -> None:
        assert not {"me/new", "me/adapter", "other/new", "me/a name"} & set(hub.repositories)
        assert set(hub.repositories["other/theirs"].refs) == {"main", "refs/pr/1"}


def check(found: list[str], kind: str, message: str) -> None:
    """Assert that an error has this class, one line, and this message; both are regular expressions."""
    assert re.fullmatch(kind, found[0]), found
    assert re.search(message, found[1]), found
    assert "\n" not in found[1]
