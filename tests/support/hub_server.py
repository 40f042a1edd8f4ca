"""A local server with the part of the Hub's HTTP API that huggingface_hub's client uses, without xet storage.

It keeps blobs in memory by their SHA-256; a commit is a dict from path to content. Permissions are those of the Hub:
everybody can read public repositories, a token allows writing to the repositories of its user, and every user with a
token can open a pull request.
"""

from __future__ import annotations

import hashlib
import json
import socket
import threading
from base64 import b64decode
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from itertools import count
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

MODES = ({"uploadMode": "regular", "shouldIgnore": False}, {"uploadMode": "lfs", "shouldIgnore": False})


class Refused(Exception):
    """An error response, with the header by which the client distinguishes errors."""

    def __init__(self, status: int, message: str, code: str = "") -> None:
        super().__init__(message)
        self.status, self.code = status, code


@dataclass
class Repository:
    """A repository: branches and pull requests by name, commits by id."""

    private: bool = False
    gated: bool = False
    refs: dict[str, str] = field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = field(default_factory=dict)
    messages: dict[str, str] = field(default_factory=dict)

    def commit(self, ref: str, files: dict[str, bytes], message: str) -> str:
        """Make `files` the newest state of `ref` and return the id of the commit."""
        content = [self.refs.get(ref), message, sorted((path, sha256(data)) for path, data in files.items())]
        name = hashlib.sha1(json.dumps(content).encode()).hexdigest()
        self.refs[ref], self.commits[name], self.messages[name] = name, files, message
        return name

    def resolve(self, revision: str) -> str:
        found = self.refs.get(revision, revision)
        if found not in self.commits:
            raise Refused(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found

    def at(self, revision: str = "main") -> dict[str, bytes]:
        """Return the files of a branch, pull request or commit."""
        return self.commits[self.resolve(revision)]

    def listing(self, revision: str) -> list[dict[str, Any]]:
        return [entry(path, data) for path, data in sorted(self.at(revision).items())]


def sha256(data: bytes) -> str:
    return hashlib.sha256(data).hexdigest()


def entry(path: str, data: bytes) -> dict[str, Any]:
    """Return the row of one file in a listing."""
    git = hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
    row: dict[str, Any] = {"type": "file", "path": path, "oid": git, "size": len(data)}
    if path.endswith(".safetensors"):
        row["lfs"] = {"oid": sha256(data), "sha256": sha256(data), "size": len(data), "pointerSize": 134}
    return row


def metadata(card: str) -> dict[str, Any]:
    found: dict[str, Any] = yaml.safe_load(card.split("---\n")[1]) if card.startswith("---\n") else {}
    return found


class HubServer(ThreadingHTTPServer):
    """A local Hub, used as a context manager. Set HF_ENDPOINT to its `url`.

    Attributes:
        repositories: "owner/name" -> repository.
        users: token -> user.
        part_bytes: larger files are uploaded in parts of this size.
        cuts: number of next uploads that lose their connection halfway.
        expired: number of uploads after those that are refused, as storage refuses an expired signed URL.
        requests: method and path of every request.
    """

    daemon_threads = True

    def __init__(self, part_bytes: int = 1 << 20) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repositories: dict[str, Repository] = {}
        self.users = {"hf_me": "me", "hf_other": "other"}
        self.part_bytes, self.cuts, self.expired = part_bytes, 0, 0
        self.blobs: dict[str, bytes] = {}
        self.parts: dict[str, dict[int, bytes]] = {}
        self.requests: list[str] = []
        self.lock = threading.Lock()

    def __enter__(self) -> HubServer:
        threading.Thread(target=self.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *exc: object) -> None:
        self.shutdown()
        self.server_close()

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Ignore errors of clients that closed the connection."""

    def publish(self, name: str, folder: Path, **settings: Any) -> str:
        """Commit the files of a folder to a repository, as if its owner had pushed them, and return the commit id."""
        repository = self.repositories.setdefault(name, Repository(**settings))
        return repository.commit("main", {file.name: file.read_bytes() for file in folder.iterdir()}, "publish")


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    disable_nagle_algorithm = True  # otherwise a body waits 40 ms for the acknowledgement of its headers
    server: HubServer

    def log_message(self, *args: Any) -> None:
        """Write no log to stderr."""

    def _answer(self) -> None:
        url, size = urlsplit(self.path), int(self.headers.get("Content-Length", 0))
        self.query = {key: values[0] for key, values in parse_qs(url.query).items()}
        self.server.requests.append(f"{self.command} {url.path}")
        with self.server.lock:
            cut = self.command == "PUT" and self.server.cuts > 0
            self.server.cuts -= cut
        self.body = self.rfile.read(size // 2 if cut else size)
        if cut:
            self.close_connection = True
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        try:
            self._route([unquote(part) for part in url.path.strip("/").split("/")])
        except Refused as refused:
            self._send(b"", refused.status, **{"X-Error-Code": refused.code, "X-Error-Message": str(refused)})

    do_GET = do_HEAD = do_POST = do_PUT = _answer

    def _route(self, parts: list[str]) -> None:
        match parts:
            case ["api", "repos", "create"]:
                self._create()
            case ["api", "validate-yaml"]:
                self._validate()
            case ["api", "models", owner, name]:
                self._info(self._readable(owner, name), f"{owner}/{name}", "main")
            case ["api", "models", owner, name, "revision", revision]:
                self._info(self._readable(owner, name), f"{owner}/{name}", revision)
            case ["api", "models", owner, name, "tree", revision]:
                self._send(self._readable(owner, name).listing(revision))
            case ["api", "models", owner, name, "branch", branch]:
                self._branch(self._writable(owner, name), branch)
            case ["api", "models", owner, name, "preupload", revision]:
                self._preupload(self._writable(owner, name), revision)
            case ["api", "models", owner, name, "commit", revision]:
                self._commit(self._writable(owner, name), f"{owner}/{name}", revision)
            case [owner, name, "info", "lfs", "objects", "batch"]:
                self._readable(owner, name.removesuffix(".git"))  # every reader may open a pull request
                self._send({"objects": [self._target(**asked) for asked in self._json()["objects"]]})
            case ["upload", oid, *part]:
                self._upload(oid, int(part[0]) if part else None)
            case ["complete", oid]:
                uploaded = self.server.parts.pop(oid)
                self._store(oid, b"".join(uploaded[part["partNumber"]] for part in self._json()["parts"]))
            case [owner, name, "resolve", revision, *path]:
                self._file(self._readable(owner, name), revision, "/".join(path))
            case _:
                raise Refused(404, "Not found", "EntryNotFound")

    def _user(self, *, needed: bool = False) -> str | None:
        kind, _, token = self.headers.get("Authorization", "").partition(" ")
        if kind and token not in self.server.users:
            raise Refused(401, "Invalid credentials in Authorization header")
        if needed and not kind:
            raise Refused(401, "Invalid username or password.")
        return self.server.users[token] if kind else None

    def _readable(self, owner: str, name: str) -> Repository:
        user, found = self._user(), self.server.repositories.get(f"{owner}/{name}")
        if found is None or (found.private and user != owner):
            raise Refused(401 if user is None else 404, "Repository not found", "RepoNotFound")
        return found

    def _writable(self, owner: str, name: str) -> Repository:
        user, found = self._user(needed=True), self._readable(owner, name)
        if user != owner and "create_pr" not in self.query:
            raise Refused(403, f"you don't have the rights to write to {owner}/{name}")
        return found

    def _create(self) -> None:
        user, asked = self._user(needed=True), self._json()
        owner = asked["organization"] or user
        name = f"{owner}/{asked['name']}"
        if owner != user:
            raise Refused(403, f"You don't have the rights to create a model under the namespace {owner!r}")
        is_new = name not in self.server.repositories
        if is_new:
            self.server.repositories[name] = Repository(private=asked.get("visibility") == "private")
            self.server.repositories[name].commit(
                "main", {".gitattributes": b"*.safetensors filter=lfs -text\n"}, "new"
            )
        self._send({"url": f"{self.server.url}/{name}"}, 200 if is_new else 409)

    def _validate(self) -> None:
        """Check the types of the fields in a model card, as the Hub does."""
        found = metadata(self._json()["content"])
        kinds = {"license": str, "base_model": str, "base_model_relation": str, "tags": list, "model-index": list}
        wrong = [key for key, kind in kinds.items() if not isinstance(found.get(key, kind()), kind)]
        errors = [{"message": f'"{key}" is not valid'} for key in wrong]
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def _info(self, repository: Repository, name: str, revision: str) -> None:
        siblings = [{**row, "rfilename": row["path"]} for row in repository.listing(revision)]
        facts = {"private": repository.private, "gated": "manual" if repository.gated else False, "tags": []}
        card = metadata(repository.at(revision).get("README.md", b"").decode())
        self._send({"id": name, "sha": repository.resolve(revision), "siblings": siblings, "cardData": card, **facts})

    def _branch(self, repository: Repository, branch: str) -> None:
        status = 409 if branch in repository.refs else 200
        repository.refs.setdefault(branch, repository.resolve("main"))
        self._send({}, status)

    def _preupload(self, repository: Repository, revision: str) -> None:
        have = {row["path"]: row.get("lfs", row)["oid"] for row in repository.listing(revision)}
        modes = {file["path"]: MODES[file["path"].endswith(".safetensors")] for file in self._json()["files"]}
        rows = [{"path": path, "oid": have.get(path), **rest} for path, rest in modes.items()]
        self._send({"files": rows})

    def _target(self, oid: str, size: int) -> dict[str, Any]:
        """Return the upload address of an object, or no address if the object is already stored."""
        found: dict[str, Any] = {"oid": oid, "size": size}
        if oid not in self.server.blobs:
            step, url = self.server.part_bytes, self.server.url
            found["actions"] = {"upload": {"href": f"{url}/upload/{oid}"}}
            if size > step:
                parts = {str(part): f"{url}/upload/{oid}/{part}" for part in range(1, -(-size // step) + 1)}
                header = {"chunk_size": str(step), **parts}
                found["actions"]["upload"] = {"href": f"{url}/complete/{oid}", "header": header}
        return found

    def _upload(self, oid: str, part: int | None) -> None:
        if self.server.expired:
            self.server.expired -= 1
            raise Refused(403, "Request has expired")
        if part is None:
            self._store(oid, self.body)
        else:
            self.server.parts.setdefault(oid, {})[part] = self.body
            self._send(b"", ETag=sha256(self.body))

    def _store(self, oid: str, data: bytes) -> None:
        if sha256(data) != oid:
            raise Refused(400, "the content is not what its name says")
        self.server.blobs[oid] = data
        self._send({})

    def _commit(self, repository: Repository, name: str, revision: str) -> None:
        files = dict(repository.at(revision))
        header, *changes = (json.loads(line) for line in self.body.splitlines())
        for kind, value in ((change["key"], change["value"]) for change in changes):
            if kind == "deletedFile":
                del files[value["path"]]
            elif kind == "lfsFile":
                files[value["path"]] = self.server.blobs[value["oid"]]
            else:
                files[value["path"]] = b64decode(value["content"])
        url, pull = f"{self.server.url}/{name}", None
        if "create_pr" in self.query:
            number = next(n for n in count(1) if f"refs/pr/{n}" not in repository.refs)
            revision, pull = f"refs/pr/{number}", f"{url}/discussions/{number}"
        commit = repository.commit(revision, files, header["value"]["summary"])
        self._send({"commitUrl": f"{url}/commit/{commit}", "commitOid": commit, "pullRequestUrl": pull})

    def _file(self, repository: Repository, revision: str, path: str) -> None:
        if repository.gated:
            raise Refused(403, "Access to this model is restricted: ask for access.", "GatedRepo")
        data = repository.at(revision).get(path)
        if data is None:
            raise Refused(404, "Entry not found", "EntryNotFound")
        etag = sha256(data) if path.endswith(".safetensors") else entry(path, data)["oid"]
        self._send(data, **{"ETag": f'"{etag}"', "X-Repo-Commit": repository.resolve(revision)})

    def _json(self) -> dict[str, Any]:
        found: dict[str, Any] = json.loads(self.body)
        return found

    def _send(self, content: Any, status: int = 200, **headers: str) -> None:
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(body))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
