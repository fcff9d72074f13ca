"""A stand-in for the Hugging Face hub on this machine: what `huggingface_hub` asks to make, fill and read a repository.

Accounts are tokens: `token-of-NAME` may write to `NAME/...`. Commits are whole snapshots, one after another on `main`.
Large files go to a store of their own first, and are given out by a redirect to it, as on the hub.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any, ClassVar
from urllib.parse import unquote, urlsplit

import huggingface_hub.constants
import pytest
import yaml

LICENSES = {"apache-2.0", "mit", "cc-by-4.0", "cc-by-nc-4.0", "openrail", "other", "unknown"}
TASKS = {"image-classification", "text-generation", "fill-mask", "unconditional-image-generation"}
REPOSITORY = r"(?P<repo>[\w.-]+/[\w.-]+)"


@dataclass
class Repository:
    """Its commits, oldest first: name and files of each."""

    private: bool
    commits: list[tuple[str, dict[str, bytes]]] = field(default_factory=list)
    messages: list[str] = field(default_factory=list)

    def add(self, files: dict[str, bytes], message: str) -> str:
        number = len(self.commits)
        name = hashlib.sha1(f"{number} {message} {sorted(files)}".encode()).hexdigest()
        self.commits.append((name, files))
        self.messages.append(message)
        return name

    def at(self, revision: str) -> tuple[str, dict[str, bytes]] | None:
        if revision == "main":
            return self.commits[-1]
        return next((commit for commit in self.commits if commit[0] == revision), None)

    @property
    def head(self) -> dict[str, bytes]:
        return self.commits[-1][1]


class Refusal(Exception):
    """An answer that is no success: status, code and message of the hub."""

    def __init__(self, status: int, code: str = "", message: str = "") -> None:
        super().__init__(message)
        self.status, self.code, self.message = status, code, message


class Hub(ThreadingHTTPServer):
    """Attributes: `repositories` by name, `store` of large files by SHA-256, `requests` as METHOD PATH, and `failing`,
    which is given each of these and may raise a `Refusal`."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.repositories: dict[str, Repository] = {}
        self.store: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.failing: Callable[[str], None] = lambda request: None

    @property
    def address(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


@contextmanager
def running_hub() -> Iterator[Hub]:
    """A hub that answers until the body ends."""
    with Hub() as hub:
        thread = threading.Thread(target=hub.serve_forever, args=(0.02,), daemon=True)
        thread.start()
        try:
            yield hub
        finally:
            hub.shutdown()
            thread.join()


@contextmanager
def this_process_at(folder: Path, account: str) -> Iterator[Hub]:
    """A hub to which this process goes, with the token of an account and a cache below a folder."""
    constants = huggingface_hub.constants
    with running_hub() as hub, pytest.MonkeyPatch.context() as patch:
        template = f"{hub.address}/{{repo_id}}/resolve/{{revision}}/{{filename}}"
        settings = {"ENDPOINT": hub.address, "HUGGINGFACE_CO_URL_TEMPLATE": template, "HF_HUB_OFFLINE": False}
        settings |= {"HF_HUB_DISABLE_XET": True, "HF_HUB_CACHE": str(folder / "cache")}
        settings |= {"HF_TOKEN_PATH": str(folder / "token"), "HF_STORED_TOKENS_PATH": str(folder / "tokens")}
        for name, value in settings.items():
            patch.setattr(constants, name, value)
        patch.setenv("HF_TOKEN", f"token-of-{account}")
        patch.delenv("HUGGING_FACE_HUB_TOKEN", raising=False)
        yield hub


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    server: Hub
    routes: ClassVar[list[tuple[str, re.Pattern[str], str]]] = [
        ("POST", re.compile(r"/api/repos/create"), "create"),
        ("POST", re.compile(r"/api/validate-yaml"), "validate_card"),
        ("POST", re.compile(rf"/api/models/{REPOSITORY}/preupload/(?P<revision>[^/]+)"), "how_to_upload"),
        ("POST", re.compile(rf"/{REPOSITORY}\.git/info/lfs/objects/batch"), "where_to_upload"),
        ("PUT", re.compile(r"/store/(?P<digest>[0-9a-f]{64})"), "upload"),
        ("POST", re.compile(rf"/api/models/{REPOSITORY}/commit/(?P<revision>[^/]+)"), "commit"),
        ("GET", re.compile(rf"/api/models/{REPOSITORY}(/revision/(?P<revision>[^/]+))?"), "information"),
        ("HEAD", re.compile(rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)"), "read"),
        ("GET", re.compile(rf"/{REPOSITORY}/resolve/(?P<revision>[^/]+)/(?P<file>.+)"), "read"),
        ("GET", re.compile(r"/store/(?P<digest>[0-9a-f]{64})"), "download"),
    ]

    def log_message(self, *args: Any) -> None:
        """Nothing: the tests look at `requests`."""

    def answer(self) -> None:
        path = unquote(urlsplit(self.path).path)
        request = f"{self.command} {path}"
        self.server.requests.append(request)
        self.body = self._body()
        try:
            self.server.failing(request)
            for method, pattern, name in self.routes:
                match = pattern.fullmatch(path)
                if match is not None and method == self.command:
                    getattr(self, name)(**{n: v for n, v in match.groupdict().items() if v is not None})
                    return
            raise Refusal(404, message=f"no such place: {path}")
        except Refusal as refusal:
            headers = {"X-Error-Code": refusal.code} if refusal.code else {}
            headers |= {"X-Error-Message": refusal.message} if refusal.message else {}
            self.send({"error": refusal.message}, refusal.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = answer

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while length := int(self.rfile.readline(), 16):
            parts.append(self.rfile.read(length))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def send(self, content: Any, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # ---- who may do what -------------------------------------------------------------------------------------

    def account(self) -> str | None:
        token = (self.headers.get("Authorization") or "").removeprefix("Bearer ")
        if token and not token.startswith("token-of-"):
            raise Refusal(401, message="Invalid credentials in Authorization header")
        return token.removeprefix("token-of-") or None

    def repository(self, name: str, *, writes: bool = False) -> Repository:
        account, repository = self.account(), self.server.repositories.get(name)
        owner = account == name.partition("/")[0]
        if repository is None or (repository.private and not owner):
            raise Refusal(401 if account is None else 404, "RepoNotFound", "Repository not found")
        if writes and not owner:
            raise Refusal(403, message="You don't have the rights to write to this repository")
        return repository

    def snapshot(self, name: str, revision: str) -> tuple[str, dict[str, bytes]]:
        commit = self.repository(name).at(revision)
        if commit is None:
            raise Refusal(404, "RevisionNotFound", f"Invalid rev id: {revision}")
        return commit

    # ---- repositories ----------------------------------------------------------------------------------------

    def create(self) -> None:
        values, account = json.loads(self.body), self.account()
        if account is None:
            raise Refusal(401, message="Invalid username or password.")
        owner = values.get("organization") or account
        if owner != account:
            raise Refusal(403, message=f'You don\'t have the rights to create a model under the namespace "{owner}"')
        name = f"{owner}/{values['name']}"
        exists = name in self.server.repositories
        if not exists:
            private = values.get("private") is True or values.get("visibility") == "private"
            self.server.repositories[name] = Repository(private)
            self.server.repositories[name].add({".gitattributes": b"*.safetensors lfs\n"}, "initial commit")
        message = {"error": "You already created this model repo"} if exists else {}
        self.send({"url": f"{self.server.address}/{name}", "name": name} | message, 409 if exists else 200)

    def information(self, repo: str, revision: str = "main") -> None:
        name, files = self.snapshot(repo, revision)
        siblings = [{"rfilename": file} for file in sorted(files)]
        private = self.server.repositories[repo].private
        self.send({"_id": repo, "id": repo, "modelId": repo, "sha": name, "private": private, "siblings": siblings})

    def validate_card(self) -> None:
        errors = card_errors(json.loads(self.body)["content"])
        self.send({"errors": [{"message": error} for error in errors], "warnings": []}, 400 if errors else 200)

    # ---- uploading -------------------------------------------------------------------------------------------

    def how_to_upload(self, repo: str, revision: str) -> None:
        _, files = self.repository(repo, writes=True).at(revision) or ("", {})
        answers = []
        for file in json.loads(self.body)["files"]:
            large = file["path"].endswith(".safetensors") or file["size"] > 10 * 2**20
            own = files.get(file["path"])
            digest = None if own is None else hashlib.sha256(own).hexdigest() if large else git_digest(own)
            answers.append({"path": file["path"], "uploadMode": "lfs" if large else "regular", "shouldIgnore": False})
            answers[-1] |= {} if digest is None else {"oid": digest}
        self.send({"files": answers})

    def where_to_upload(self, repo: str) -> None:
        self.repository(repo, writes=True)
        objects = []
        for entry in json.loads(self.body)["objects"]:
            upload = {"upload": {"href": f"{self.server.address}/store/{entry['oid']}", "header": {}}}
            objects.append(entry | ({} if entry["oid"] in self.server.store else {"actions": upload}))
        self.send({"transfer": "basic", "objects": objects})

    def upload(self, digest: str) -> None:
        if hashlib.sha256(self.body).hexdigest() != digest:
            raise Refusal(400, message="other bytes than their digest says")
        self.server.store[digest] = self.body
        self.send({})

    def commit(self, repo: str, revision: str) -> None:
        repository = self.repository(repo, writes=True)
        lines = [json.loads(line) for line in self.body.splitlines()]
        header = lines[0]["value"]
        name, files = repository.commits[-1]
        if header.get("parentCommit") not in (None, name):
            raise Refusal(412, message="A commit has happened since. Please refresh and try again.")
        files = dict(files)
        for line in lines[1:]:
            value = line["value"]
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.store[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
            else:
                raise Refusal(400, message=f"unknown operation {line['key']}")
        name = repository.add(files, header["summary"])
        self.send({"success": True, "commitOid": name, "commitUrl": f"{self.server.address}/{repo}/commit/{name}"})

    # ---- reading ---------------------------------------------------------------------------------------------

    def read(self, repo: str, revision: str, file: str) -> None:
        name, files = self.snapshot(repo, revision)
        if file not in files:
            raise Refusal(404, "EntryNotFound", "Entry not found")
        content, commit = files[file], {"X-Repo-Commit": name}
        digest = hashlib.sha256(content).hexdigest()
        if digest not in self.server.store:
            self.send(content, headers=commit | {"ETag": f'"{git_digest(content)}"'})
            return
        size = {"X-Linked-Size": str(len(content)), "X-Linked-ETag": f'"{digest}"'}
        # By another name than that of the hub, as the store has: no token goes there.
        self.send(b"", 302, commit | size | {"Location": f"http://localhost:{self.server.server_port}/store/{digest}"})

    def download(self, digest: str) -> None:
        assert self.headers.get("Authorization") is None
        self.send(self.server.store[digest], headers={"ETag": f'"{digest}"'})


def git_digest(content: bytes) -> str:
    """The name that git gives a file."""
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


def card_errors(text: str) -> list[str]:
    """What the hub would refuse of a model card's header."""
    match = re.match(r"---\n(.*?\n)---\n", text, re.S)
    values = {} if match is None else yaml.safe_load(match[1])
    errors = [f"license {values.get('license')!r}"] if values.get("license") not in {None, *LICENSES} else []
    if values.get("pipeline_tag") not in {None, *TASKS}:
        errors.append(f"pipeline_tag {values['pipeline_tag']!r}")
    for name in ("tags", "datasets"):
        entries = values.get(name, [])
        if not isinstance(entries, list) or not all(isinstance(entry, str) for entry in entries):
            errors.append(f"{name} {entries!r}")
    return errors
