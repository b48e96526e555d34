"""A stand-in for the Hugging Face Hub on the loopback interface, for reading and for writing.

    with LocalHub(models={"owner/name": folder}, datasets={"owner/name": folder}) as hub:
        subprocess.run(command, env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"})

It answers what `from_pretrained`, `load_dataset` and the calls of HfApi that push ask: repositories with commits, branches
and tags; small files in the commit, large ones by LFS, which are served from another host name, as on the Hub. Every call
can be made slow, refused, or cut by `faults`. Written from what the clients send; no xet.
"""

import base64
import gzip
import hashlib
import json
import re
import socket
import struct
import threading
import time
from collections.abc import Callable, Collection
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from conftest import SAMPLE

Folders = dict[str, Path]  # by the repository's name, "owner/name"
Files = dict[str, bytes]
TOKEN = "hf_stand_in_of_the_tests"  # may read all, and write what "someone" owns
READER = "hf_that_may_only_read"
LARGE = re.compile(r".*\.(safetensors|png|gz|parquet)")  # travels by LFS
REPOSITORY = r"/api/(?P<kind>model|dataset)s/(?P<name>[^/]+/[^/]+)"
WEB = r"/(?:(?P<kind>dataset)s/)?(?P<name>[^/]+/[^/]+)"


class RefusedError(Exception):
    """An answer without content. The clients tell cases apart by `code` and `message`, not by the status."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.status, self.headers = status, {name: value for name, value in headers.items() if value}


@dataclass
class Fault:
    """What is done to requests that `pattern` finds in "METHOD PATH", the first `skip` of them not, `times` of them.

    status: answered with it. seconds: answered so much later. reset: the connection is reset at once. lost: the work is
    done, and then the connection reset. cut: the answer ends after so many bytes of its content.
    """

    pattern: str
    times: int = 1
    skip: int = 0
    status: int | None = None
    seconds: float = 0
    reset: bool = False
    lost: bool = False
    cut: int | None = None


@dataclass
class Commit:
    """The files of one moment. Its hash follows from them and from the one before."""

    files: Files
    title: str = "initial commit"
    parent: str = ""

    @property
    def sha(self) -> str:
        contents = "".join(name + _sha1(content) for name, content in sorted(self.files.items()))
        return _sha1((self.parent + self.title + contents).encode())


@dataclass
class Repository:
    """Commits in their order, and what names them."""

    private: bool = False
    gated: bool = False
    commits: list[Commit] = field(default_factory=list)
    branches: dict[str, str] = field(default_factory=dict)
    tags: dict[str, str] = field(default_factory=dict)

    @classmethod
    def of(cls, files: Files, private: bool = False, gated: bool = False) -> "Repository":
        first = Commit(files)
        return cls(private, gated, [first], {"main": first.sha})

    def at(self, revision: str) -> Commit:
        sha = self.branches.get(revision) or self.tags.get(revision) or revision
        found = [one for one in self.commits if one.sha == sha]
        if not found:
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found[0]

    @property
    def commit(self) -> str:
        return self.branches["main"]

    @property
    def files(self) -> Files:
        return self.at("main").files


class LocalHub:
    """Serves folders as they were when it was made, while it is entered; `private` ones to who sends a token.

    `log` has every request as "METHOD PATH STATUS", `clients` who sent it (the User-Agent), `unknown` the paths of those
    to a route that is missing here, so that a client which asks for something new does not quietly go another way.
    """

    def __init__(
        self, models: Folders, datasets: Folders, private: Collection[str] = (), gated: Collection[str] = ()
    ) -> None:
        self.repositories = {
            (kind, name): Repository.of(_contents(folder), name in private, name in gated)
            for kind, folders in (("model", models), ("dataset", datasets))
            for name, folder in folders.items()
        }
        self.tokens = {TOKEN: "write", READER: "read"}
        self.blobs: dict[str, bytes] = {}  # of LFS, by their SHA-256
        self.faults: list[Fault] = []
        self.log: list[str] = []
        self.clients: set[str] = set()
        self.unknown: list[str] = []
        self.lock = threading.Lock()
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True  # a client's idle connection must not keep the tests from ending
        self.port = self._server.server_port
        self.url = f"http://127.0.0.1:{self.port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def fault_of(self, request: str) -> Fault | None:
        with self.lock:
            for fault in self.faults:
                if fault.times > 0 and re.search(fault.pattern, request):
                    if fault.skip > 0:
                        fault.skip -= 1
                        continue
                    fault.times -= 1
                    return fault
        return None

    def find(self, kind: str, name: str, token: str, write: bool = False, content: bool = False) -> Repository:
        """Who may not see a repository is told that there is none, without a token by 401: as on the Hub."""
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and not token):
            raise RefusedError(404 if token else 401, "Repository not found", "RepoNotFound")
        if write:
            self.check_write(name.split("/")[0], token)
        if content and repository.gated and self.tokens.get(token) != "write":
            raise RefusedError(403 if token else 401, f"Access to {name} is restricted", "GatedRepo")
        return repository

    def check_write(self, owner: str, token: str) -> None:
        if self.tokens.get(token) != "write" or owner != "someone":
            raise RefusedError(401 if not token else 403, f"no permission to write for {owner}")


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        path, _, query = self.path.partition("?")
        self.query, self.form = parse_qs(query), self.rfile.read(int(self.headers.get("Content-Length", 0)))
        self.hub.clients.add(self.headers.get("User-Agent", ""))
        fault = self.hub.fault_of(f"{self.command} {path}") or Fault("", 0)
        time.sleep(fault.seconds)
        if fault.reset:
            self.reset(path)
            return
        try:
            if fault.status is not None:
                raise RefusedError(fault.status, "a fault of the tests")
            status, content, headers = self.answer(unquote(urlsplit(path).path))
        except RefusedError as refused:
            status, content, headers = refused.status, b"", refused.headers
        if fault.lost:
            self.reset(path)
            return
        self.hub.log.append(f"{self.command} {path} {status}")
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content[: fault.cut])
            if fault.cut is not None:
                self.wfile.flush()
                self.reset("")

    do_HEAD = do_POST = do_PUT = do_DELETE = do_GET  # noqa: N815

    def reset(self, path: str) -> None:
        """Closes the connection so that the client sees it broken."""
        if path:
            self.hub.log.append(f"{self.command} {path} reset")
        self.close_connection = True
        self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
        self.connection.close()

    def answer(self, path: str) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers."""
        self.token = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if self.token and self.token not in self.hub.tokens:
            raise RefusedError(401, "Invalid credentials in Authorization header")
        for method, pattern, route in ROUTES:
            if self.command in method.split("|") and (match := re.fullmatch(pattern, path)):
                with self.hub.lock:
                    result = route(self, **match.groupdict())
                return result if isinstance(result, tuple) else (200, json.dumps(result).encode(), JSON)
        self.hub.unknown.append(path)
        raise RefusedError(404, "the stand-in has no such route")

    def body(self) -> Any:
        return json.loads(self.form)

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal; the hub has the log."""


JSON = {"Content-Type": "application/json"}
ROUTES: list[tuple[str, str, Callable[..., Any]]] = []


def route(method: str, pattern: str) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    def register(function: Callable[..., Any]) -> Callable[..., Any]:
        ROUTES.append((method, pattern, function))
        return function

    return register


@route("GET", "/api/whoami-v2")
def whoami(call: Handler) -> Any:
    if not call.token:
        raise RefusedError(401, "Invalid username or password.")
    role = call.hub.tokens[call.token]
    return {"type": "user", "name": "someone", "orgs": [], "auth": {"accessToken": {"role": role}}}


@route("POST", "/api/validate-yaml")
def validate(call: Handler) -> Any:
    return {"errors": [], "warnings": []}


@route("POST", "/api/repos/create")
def create(call: Handler) -> Any:
    wanted = call.body()
    name, kind = f"{wanted.get('organization') or 'someone'}/{wanted['name']}", wanted.get("type") or "model"
    call.hub.check_write(name.split("/")[0], call.token)
    answer = {"url": f"{call.hub.url}/{name}", "name": name}
    if (kind, name) in call.hub.repositories:
        return 409, json.dumps({**answer, "error": "You already created this repo"}).encode(), JSON
    private = wanted.get("private") or wanted.get("visibility") == "private"
    call.hub.repositories[kind, name] = Repository.of({".gitattributes": b"*.png filter=lfs\n"}, bool(private))
    return answer


@route("GET", REPOSITORY)
@route("GET", REPOSITORY + "/revision/(?P<revision>.+)")
def info(call: Handler, kind: str, name: str, revision: str = "main") -> Any:
    repository = call.hub.find(kind, name, call.token)
    commit = repository.at(revision)
    siblings = [_entry(*file) for file in commit.files.items()]
    return {"id": name, "sha": commit.sha, "private": repository.private, "siblings": siblings}


@route("GET", REPOSITORY + "/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?")
def tree(call: Handler, kind: str, name: str, revision: str, folder: str | None = None) -> Any:
    """What is in a folder; with `recursive`, below it too."""
    commit = call.hub.find(kind, name, call.token).at(revision)
    start = f"{folder}/" if folder else ""
    below = {path[len(start) :]: content for path, content in commit.files.items() if path.startswith(start)}
    if not below:
        raise RefusedError(404, f"{folder} does not exist", "EntryNotFound", commit.sha)
    deep = call.query.get("recursive", ["false"])[0].lower() == "true"
    folders = sorted({path.split("/")[0] for path in below if "/" in path})
    files = [_entry(start + path, content) for path, content in below.items() if deep or "/" not in path]
    return [
        *files,
        *({"type": "directory", "path": start + one, "oid": _sha1(one.encode()), "size": 0} for one in folders),
    ]


@route("POST", REPOSITORY + "/paths-info/(?P<revision>[^/]+)")
def paths_info(call: Handler, kind: str, name: str, revision: str) -> Any:
    files = call.hub.find(kind, name, call.token).at(revision).files
    return [_entry(path, files[path]) for path in parse_qs(call.form.decode())["paths"] if path in files]


@route("GET", REPOSITORY + "/refs")
def refs(call: Handler, kind: str, name: str) -> Any:
    repository = call.hub.find(kind, name, call.token)
    shown = {"branches": ("heads", repository.branches), "tags": ("tags", repository.tags)}
    return {"converts": []} | {
        key: [{"name": one, "ref": f"refs/{what}/{one}", "targetCommit": sha} for one, sha in names.items()]
        for key, (what, names) in shown.items()
    }


@route("POST|DELETE", REPOSITORY + "/(?P<what>branch|tag)/(?P<which>.+)")
def name_commit(call: Handler, kind: str, name: str, what: str, which: str) -> Any:
    repository = call.hub.find(kind, name, call.token, write=True)
    names = repository.branches if what == "branch" else repository.tags
    if call.command == "DELETE":
        names.pop(which)
        return {}
    wanted = call.body() if call.form else {}
    new = wanted.get("tag") or which
    if new in names:
        raise RefusedError(409, f"{new} exists")
    names[new] = repository.at(wanted.get("startingPoint") or (which if what == "tag" else "main")).sha
    return {}


@route("POST", REPOSITORY + "/preupload/(?P<revision>[^/]+)")
def preupload(call: Handler, kind: str, name: str, revision: str) -> Any:
    files = call.hub.find(kind, name, call.token, write=True).at(revision).files
    return {
        "files": [
            {
                "path": one["path"],
                "uploadMode": "lfs" if LARGE.fullmatch(one["path"]) else "regular",
                "shouldIgnore": False,
                **({"oid": _oid(one["path"], files[one["path"]])} if one["path"] in files else {}),
            }
            for one in call.body()["files"]
        ]
    }


@route("POST", WEB + r"\.git/info/lfs/objects/batch")
def batch(call: Handler, kind: str | None, name: str) -> Any:
    call.hub.find(kind or "model", name, call.token, write=True)
    objects = []
    for one in call.body()["objects"]:
        href = f"{call.hub.url}/lfs/{one['oid']}"
        actions = {"upload": {"href": href}, "verify": {"href": f"{href}/verify"}}
        objects.append({**one, "authenticated": True, **({} if one["oid"] in call.hub.blobs else {"actions": actions})})
    return {"transfer": "basic", "objects": objects}


@route("PUT", r"/lfs/(?P<oid>[0-9a-f]{64})")
def put(call: Handler, oid: str) -> Any:
    if hashlib.sha256(call.form).hexdigest() != oid:
        raise RefusedError(400, "the content has another hash")
    call.hub.blobs[oid] = call.form
    return {}


@route("POST", r"/lfs/(?P<oid>[0-9a-f]{64})/verify")
def verify(call: Handler, oid: str) -> Any:
    if oid not in call.hub.blobs:
        raise RefusedError(404, "not stored")
    return {}


@route("POST", REPOSITORY + "/commit/(?P<revision>[^/]+)")
def commit(call: Handler, kind: str, name: str, revision: str) -> Any:
    repository = call.hub.find(kind, name, call.token, write=True)
    lines = [json.loads(line) for line in call.form.splitlines() if line.strip()]
    parent = repository.at(revision)
    files, header = dict(parent.files), lines[0]["value"]
    if header.get("parentCommit") not in (None, parent.sha):
        raise RefusedError(412, "A commit has happened since. Please refresh and try again.")
    for line in lines[1:]:
        path = line["value"]["path"]
        if line["key"] == "file":
            files[path] = base64.b64decode(line["value"]["content"])
        elif line["key"] == "lfsFile":
            files[path] = call.hub.blobs[line["value"]["oid"]]
        elif line["key"] == "deletedFile":
            del files[path]
        else:
            raise RefusedError(400, f"unknown operation {line['key']}")
    new = Commit(files, header["summary"], parent.sha)
    repository.commits.append(new)
    repository.branches[revision] = new.sha
    return {"success": True, "commitOid": new.sha, "commitUrl": f"{call.hub.url}/{name}/commit/{new.sha}"}


@route("GET|HEAD", WEB + "/resolve/(?P<revision>[^/]+)/(?P<path>.+)")
def resolve(call: Handler, kind: str | None, name: str, revision: str, path: str) -> Any:
    at = call.hub.find(kind or "model", name, call.token, content=True).at(revision)
    if path not in at.files:
        raise RefusedError(404, "Entry not found", "EntryNotFound", at.sha)
    content = at.files[path]
    headers = {"X-Repo-Commit": at.sha, "Accept-Ranges": "bytes"}
    if not LARGE.fullmatch(path):
        return _part_of(call, content, headers | {"ETag": f'"{_oid(path, content)}"'})
    oid = _oid(path, content)
    call.hub.blobs[oid] = content
    elsewhere = f"http://localhost:{call.hub.port}/stored/{oid}"
    linked = {"X-Linked-Etag": f'"{oid}"', "X-Linked-Size": str(len(content)), "Location": elsewhere}
    return 302, b"", headers | linked


@route("GET|HEAD", "/stored/(?P<oid>[0-9a-f]{64})")
def stored(call: Handler, oid: str) -> Any:
    assert not call.token, "the token was sent to where large files are stored"
    return _part_of(call, call.hub.blobs[oid], {"ETag": f'"{oid}"', "Accept-Ranges": "bytes"})


def _part_of(call: Handler, content: bytes, headers: dict[str, str]) -> tuple[int, bytes, dict[str, str]]:
    """A file, or those of its bytes that the Range header names."""
    bounds = re.fullmatch(r"bytes=(\d+)-(\d*)", call.headers.get("Range", ""))
    if bounds is None:
        return 200, content, headers
    first, last = int(bounds[1]), min(int(bounds[2] or len(content)), len(content) - 1)
    return 206, content[first : last + 1], {**headers, "Content-Range": f"bytes {first}-{last}/{len(content)}"}


def _contents(folder: Path) -> Files:
    return {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}


def _entry(name: str, content: bytes) -> dict[str, Any]:
    """A file in a listing; `rfilename` is its name among the siblings of a repository."""
    large = {
        "lfs": {"sha256": _oid(name, content), "oid": _oid(name, content), "size": len(content), "pointerSize": 134}
    }
    blob = _sha1(b"blob %d\0" % len(content) + content)
    shown = {"type": "file", "path": name, "rfilename": name, "size": len(content), "oid": blob, "blobId": blob}
    return shown | (large if LARGE.fullmatch(name) else {})


def _oid(name: str, content: bytes) -> str:
    """SHA-256 of a large file, git's own hash of another."""
    if LARGE.fullmatch(name):
        return hashlib.sha256(content).hexdigest()
    return _sha1(b"blob %d\0" % len(content) + content)


def _sha1(content: bytes) -> str:
    return hashlib.sha1(content).hexdigest()


def write_data(folder: Path) -> None:
    """A data set repository: sixty questions of the shipped sample."""
    folder.mkdir()
    (folder / "README.md").write_text("# Sixty questions\n")
    (folder / "train.jsonl.gz").write_bytes(gzip.compress(b"".join(_sixty_questions())))


def write_model(folder: Path) -> None:
    """A model repository: a GPT-2 of some 30,000 random weights, with its tokenizer."""
    import torch
    from transformers import GPT2Config, GPT2LMHeadModel

    from clm_dist.data.tokenize import token_ids, train_tokenizer

    texts = [text for line in _sixty_questions() for text in json.loads(line)["answers"]["text"]]
    tokenizer = train_tokenizer(texts, 300)
    tokenizer.save_pretrained(folder)
    torch.manual_seed(0)
    config = GPT2Config(n_layer=1, n_embd=32, n_head=2, n_positions=256, **token_ids(tokenizer))
    GPT2LMHeadModel(config).save_pretrained(folder)


def _sixty_questions() -> list[bytes]:
    return SAMPLE.read_bytes().splitlines(keepends=True)[:60]
