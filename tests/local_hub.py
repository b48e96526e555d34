"""A read-only stand-in for the Hugging Face Hub on the loopback interface.

    with LocalHub(models={"owner/name": folder}, datasets={"owner/name": folder}) as hub:
        subprocess.run(command, env=os.environ | {"HF_ENDPOINT": hub.url, "HF_HUB_DISABLE_XET": "1"})

It answers what `from_pretrained`, `HfApi.model_info`, `HfApi.dataset_info` and `load_dataset` ask. A
repository is one commit, called `main` and by its hash, of the files in a folder (none below it).
No writing, no xet.
"""

import gzip
import hashlib
import json
import re
import threading
from collections.abc import Collection
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

from conftest import SAMPLE

Folders = dict[str, Path]  # by the repository's name, "owner/name"
TOKEN = "hf_stand_in_of_the_tests"
API = re.compile(r"/api/(model|dataset)s/([^/]+/[^/]+)(?:/(revision|tree|paths-info)/([^/]+)(?:/(.+))?)?")
FILE = re.compile(r"/(?:(dataset)s/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")


class RefusedError(Exception):
    """An answer without content. The clients tell cases apart by `code` and `message`, not by the status."""

    def __init__(self, status: int, message: str, code: str = "", commit: str = "") -> None:
        headers = {"X-Error-Message": message, "X-Error-Code": code, "X-Repo-Commit": commit}
        self.status, self.headers = status, {name: value for name, value in headers.items() if value}


class Repository:
    """The files of one commit by name, and the commit's hash, which follows from them."""

    def __init__(self, folder: Path, private: bool) -> None:
        self.files = {path.name: path.read_bytes() for path in sorted(folder.iterdir()) if path.is_file()}
        self.private = private
        self.commit = _sha1("".join(name + _sha1(content) for name, content in self.files.items()).encode())


class LocalHub:
    """Serves folders as they were when it was made, while it is entered; `private` ones to who sends TOKEN.

    `log` has every request as "METHOD PATH STATUS", `unknown` the paths of those to a route that is missing
    here, so that a client which asks for something new does not quietly go another way.
    """

    def __init__(self, models: Folders, datasets: Folders, private: Collection[str] = ()) -> None:
        folders = {("model", name): folder for name, folder in models.items()}
        folders |= {("dataset", name): folder for name, folder in datasets.items()}
        self.repositories = {key: Repository(folder, key[1] in private) for key, folder in folders.items()}
        self.log: list[str] = []
        self.unknown: list[str] = []
        handler = type("BoundHandler", (Handler,), {"hub": self})
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self._server.daemon_threads = True  # a client's idle connection must not keep the tests from ending
        self.url = f"http://127.0.0.1:{self._server.server_port}"

    def __enter__(self) -> "LocalHub":
        threading.Thread(target=self._server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    def find(self, kind: str, name: str, revision: str, authorization: str) -> Repository:
        """Who may not see a repository is told that there is none, without a token by 401: as on the Hub."""
        if authorization and authorization != f"Bearer {TOKEN}":
            raise RefusedError(401, "Invalid credentials in Authorization header")
        repository = self.repositories.get((kind, name))
        if repository is None or (repository.private and not authorization):
            raise RefusedError(404 if authorization else 401, "Repository not found", "RepoNotFound")
        if revision not in ("main", repository.commit):
            raise RefusedError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return repository


class Handler(BaseHTTPRequestHandler):
    hub: LocalHub
    protocol_version = "HTTP/1.1"

    def do_GET(self) -> None:
        try:
            status, content, headers = self.answer()
        except RefusedError as refused:
            status, content, headers = refused.status, b"", refused.headers
        self.hub.log.append(f"{self.command} {self.path} {status}")
        self.send_response(status)
        for name, value in {**headers, "Content-Length": str(len(content))}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    do_HEAD = do_POST = do_GET  # noqa: N815

    def answer(self) -> tuple[int, bytes, dict[str, str]]:
        """Status, content and headers."""
        path = urlsplit(self.path).path
        form = parse_qs(self.rfile.read(int(self.headers.get("Content-Length", 0))).decode())
        authorization = self.headers.get("Authorization", "")
        if match := API.fullmatch(path):
            kind, name, what, revision, folder = (unquote(part or "") for part in match.groups())
            repository = self.hub.find(kind, name, revision or "main", authorization)
            if folder:
                raise RefusedError(404, f"{folder} does not exist", "EntryNotFound", repository.commit)
            wanted = form.get("paths", repository.files)  # paths-info names them
            entries = [_entry(*file) for file in repository.files.items() if file[0] in wanted]
            whole = {"id": name, "sha": repository.commit, "private": repository.private, "siblings": entries}
            content = json.dumps(entries if what in ("tree", "paths-info") else whole).encode()
            return 200, content, {"Content-Type": "application/json"}
        if match := FILE.fullmatch(path):
            kind, name, revision, file_name = (unquote(part or "") for part in match.groups())
            repository = self.hub.find(kind or "model", name, revision, authorization)
            if file_name not in repository.files:
                raise RefusedError(404, "Entry not found", "EntryNotFound", repository.commit)
            return self.part_of(repository.files[file_name], repository.commit)
        self.hub.unknown.append(path)
        raise RefusedError(404, "the stand-in has no such route")

    def part_of(self, content: bytes, commit: str) -> tuple[int, bytes, dict[str, str]]:
        """A file, or those of its bytes that the Range header names."""
        headers = {"X-Repo-Commit": commit, "ETag": f'"{_sha1(content)}"', "Accept-Ranges": "bytes"}
        bounds = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if bounds is None:
            return 200, content, headers
        first, last = int(bounds[1]), min(int(bounds[2] or len(content)), len(content) - 1)
        headers["Content-Range"] = f"bytes {first}-{last}/{len(content)}"
        return 206, content[first : last + 1], headers

    def log_message(self, *_: object) -> None:
        """Nothing on the terminal; the hub has the log."""


def _entry(name: str, content: bytes) -> dict[str, Any]:
    """A file in a listing; `rfilename` is its name among the siblings of a repository."""
    return {"type": "file", "path": name, "rfilename": name, "size": len(content), "oid": _sha1(content)}


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
