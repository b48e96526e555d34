"""A stand-in for the W&B server on the loopback interface, for the real client: runs, their rows, files and artifacts.

    with LocalWandb() as server:
        subprocess.run(command, env=os.environ | server.environment)
    [run] = server.runs.values()

It answers what `wandb.init`, `log`, `Table`, `finish` and a resume ask (wandb 0.31), and this project's own question.
`behave("refuse" | "hang" | "unauthorized" | "well")` changes it at any time. Operations that it does not know are in
`unknown`, so that a client which asks for something new does not quietly go another way.
"""

import gzip
import json
import re
import threading
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from typing import Any

from conftest import read_rows

KEY = "0123456789abcdef" * 2 + "01234567"  # as long as theirs are
ENTITY = {"id": "e1", "name": "local"}
VIEWER = {
    "id": "u1",
    "entity": "local",
    "username": "local",
    "email": "a@b.example",
    "flags": "{}",
    "teams": {"edges": []},
}
STREAM = re.compile(r"/files/(?:[^/]+/)?([^/]+)/([^/]+)/file_stream")
UPLOAD = re.compile(r"/upload/([^/]+)/(.+)")


@dataclass
class Run:
    """What the server knows of a run."""

    name: str
    history: dict[int, dict[str, Any]] = field(default_factory=dict)  # by its place in the stream
    events: dict[int, dict[str, Any]] = field(default_factory=dict)
    overwritten: int = 0  # rows that came a second time at the same place
    summary: dict[str, Any] = field(default_factory=dict)
    settings: dict[str, Any] = field(default_factory=dict)  # of UpsertBucket: config, group, tags, commit, ...
    files: dict[str, bytes] = field(default_factory=dict)
    opened: int = 0
    state: str = "running"

    def rows(self) -> list[dict[str, Any]]:
        return [self.history[place] for place in sorted(self.history)]

    @property
    def config(self) -> dict[str, Any]:
        return {name: entry["value"] for name, entry in json.loads(self.settings.get("config", "{}")).items()}


class LocalWandb:
    """Serves while it is entered."""

    def __init__(self) -> None:
        self.runs: dict[str, Run] = {}
        self.unknown: list[str] = []
        self.log: list[tuple[str, str]] = []  # path and operation of every request
        self.lock = threading.RLock()
        self._behaviour = "well"
        self._release = threading.Event()
        self._httpd = ThreadingHTTPServer(("127.0.0.1", 0), type("BoundHandler", (Handler,), {"server_": self}))
        self._httpd.daemon_threads = True
        self._httpd.handle_error = lambda *_: None  # clients that are killed in mid-request are part of the tests
        self.url = f"http://127.0.0.1:{self._httpd.server_address[1]}"
        self.environment = {
            "WANDB_BASE_URL": self.url,
            "WANDB_API_KEY": KEY,
            "NO_PROXY": "127.0.0.1",
            "WANDB_MODE": "",
            "NETRC": "/dev/null",  # whatever the machine says
        }

    def __enter__(self) -> "LocalWandb":
        threading.Thread(target=self._httpd.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()
        return self

    def __exit__(self, *_: object) -> None:
        self._release.set()
        self._httpd.shutdown()
        self._httpd.server_close()

    def behave(self, how: str) -> None:
        """well; refuse: 503; unauthorized: 401; hang: no answer until it behaves otherwise."""
        self._behaviour = how
        self._release.set()
        self._release = threading.Event()

    def answer(self, path: str, body: bytes) -> tuple[int, Any]:
        while self._behaviour == "hang":
            self._release.wait()
        if self._behaviour != "well":
            return {"refuse": 503, "unauthorized": 401}[self._behaviour], {"error": self._behaviour}
        with self.lock:
            if path.endswith("/graphql"):
                question = json.loads(body)
                named = re.search(r"(?:query|mutation)\s+(\w+)", question.get("query", ""))
                operation = question.get("operationName") or (named[1] if named else "?")
                self.log.append((path, operation))
                return 200, {"data": self._graphql(operation, question.get("variables") or {})}
            self.log.append((path, ""))
            if found := STREAM.match(path):
                self._stream(self.runs[found[2]], json.loads(body))
                return 200, {"exitcode": None, "limits": {}}
            if found := UPLOAD.match(path):
                if found[1] in self.runs:
                    self.runs[found[1]].files[found[2]] = body
                return 200, {}
            if not path.startswith("/sdk/otel/"):  # the client's own telemetry
                self.unknown.append(path)
            return 200, {}

    def _graphql(self, operation: str, given: dict[str, Any]) -> dict[str, Any]:
        method = getattr(self, f"_on_{operation}", None)
        if method is None:
            self.unknown.append(operation)
            return {}
        return method(given)

    def _on_Viewer(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802 - these are named as their operations
        return {"viewer": VIEWER}

    def _on_ServerFeaturesQuery(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"serverInfo": {"features": []}}

    def _on_OrganizationCoreWeaveOrganizationID(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"entity": {"organization": {"coreWeaveOrganizationId": None}}}

    def _on_Arrived(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs.get(given["run"])
        bucket = run and {"historyLineCount": len(run.history), "historyTail": _tail(run.history)}
        return {"viewer": {"entity": "local"}, "model": {"bucket": bucket}}

    def _on_RunResumeStatus(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        run = self.runs.get(given["name"])
        bucket = run and {
            "id": f"id-{run.name}",
            "name": run.name,
            "displayName": run.settings.get("displayName") or run.name,
            "summaryMetrics": json.dumps(run.summary),
            "logLineCount": 0,
            "historyLineCount": len(run.history),
            "eventsLineCount": len(run.events),
            "historyTail": _tail(run.history),
            "eventsTail": _tail(run.events),
            "config": run.settings.get("config", "{}"),
            "tags": run.settings.get("tags") or [],
            "notes": None,
            "wandbConfig": json.dumps({"t": {}}),
        }
        return {"model": {"id": "p1", "name": given["project"], "entity": ENTITY, "bucket": bucket}}

    def _on_UpsertBucket(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        new = given["name"] not in self.runs
        run = self.runs.setdefault(given["name"], Run(given["name"]))
        run.settings |= {name: value for name, value in given.items() if value is not None}
        run.opened += "config" in given and given.get("state") is None and (new or run.state != "running")
        run.state = "running"
        bucket = {
            "id": f"id-{run.name}",
            "name": run.name,
            "displayName": run.settings.get("displayName") or run.name,
            "description": None,
            "config": run.settings.get("config", "{}"),
            "sweepName": None,
            "project": {"id": "p1", "name": given["project"], "entity": ENTITY},
            "historyLineCount": len(run.history),
        }
        return {"upsertBucket": {"bucket": bucket, "inserted": new}}

    def _on_CreateRunFiles(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        files = [{"name": name, "uploadUrl": f"{self.url}/upload/{given['run']}/{name}"} for name in given["files"]]
        return {"createRunFiles": {"runID": given["run"], "uploadHeaders": [], "files": files}}

    def _on_ArtifactType(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"project": {"artifact": None}}

    def _on_CreateArtifact(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        sequence = {"id": "s1", "latestArtifact": None}
        return {
            "createArtifact": {
                "artifact": {"id": f"a{len(self.log)}", "state": "PENDING", "artifactSequence": sequence}
            }
        }

    def _on_CreateArtifactManifest(self, _: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        file = {"id": "f1", "name": "m", "displayName": "m", "uploadUrl": f"{self.url}/upload/artifact/m"}
        file["uploadHeaders"] = []
        return {"createArtifactManifest": {"artifactManifest": {"id": "m1", "file": file}}}

    def _on_CreateArtifactFiles(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        edges = [
            {
                "node": {
                    "id": f"f{number}",
                    "name": file["name"],
                    "displayName": file["name"],
                    "uploadUrl": f"{self.url}/upload/artifact/{file['name']}",
                    "uploadHeaders": [],
                    "artifact": {"id": file["artifactID"]},
                    "storagePath": "s",
                    "uploadMultipartUrls": None,
                }
            }
            for number, file in enumerate((given.get("input") or given)["artifactFiles"])
        ]
        return {"createArtifactFiles": {"files": {"edges": edges}}}

    def _on_CommitArtifact(self, given: dict[str, Any]) -> dict[str, Any]:  # noqa: N802
        return {"commitArtifact": {"artifact": {"id": given["artifactID"], "digest": "d", "state": "COMMITTED"}}}

    def _stream(self, run: Run, message: dict[str, Any]) -> None:
        for name, part in (message.get("files") or {}).items():
            rows = {"wandb-history.jsonl": run.history, "wandb-events.jsonl": run.events}.get(name)
            if rows is not None:
                for place, line in enumerate(part["content"], part["offset"]):
                    run.overwritten += place in rows
                    rows[place] = json.loads(line)
            elif name == "wandb-summary.json":
                run.summary = json.loads(part["content"][-1])
        if message.get("complete"):
            run.state = "finished" if message.get("exitcode") == 0 else "failed"


def only(server: LocalWandb) -> Run:
    """The one run that there is."""
    [run] = server.runs.values()
    return run


def wanted(run: Path) -> dict[int, dict[str, Any]]:
    """The rows of metrics.jsonl by step, those of one step together."""
    found: dict[int, dict[str, Any]] = {}
    for row in read_rows(run / "metrics.jsonl"):
        found.setdefault(row["step"], {}).update(row)
    return found


def check_arrived(server: LocalWandb, run: Path, computed_again: bool = False) -> None:
    """Asserts that every step of metrics.jsonl came once, in order, at its own place, with its figures.

    computed_again: speeds of steps that a restart computed a second time are those of the first.
    """
    there, rows = only(server), wanted(run)
    history = there.rows()
    assert [row["trainer/step"] for row in history] == sorted(rows)
    assert [row["_step"] for row in history] == list(range(len(rows)))
    for row in history:
        for name, value in rows[row["trainer/step"]].items():
            if "/" in name and not (computed_again and name.startswith("perf/")):
                assert row[name] == value, (row["trainer/step"], name)
        assert row["trainer/tokens"] == row["trainer/step"] * 192  # tokens of a step of prepare_recipe


def _tail(rows: dict[int, dict[str, Any]]) -> str:
    return json.dumps([json.dumps(rows[place]) for place in sorted(rows)[-1:]])


class Handler(BaseHTTPRequestHandler):
    """HTTP around `answer`."""

    server_: LocalWandb
    protocol_version = "HTTP/1.1"

    def log_message(self, *_: object) -> None:
        """Nothing on the screen."""

    def _any(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        if self.headers.get("Content-Encoding") == "gzip":
            body = gzip.decompress(body)
        status, content = self.server_.answer(self.path.partition("?")[0], body)
        text = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(text)))
        self.end_headers()
        self.wfile.write(text)

    do_GET = do_POST = do_PUT = do_HEAD = _any  # noqa: N815
