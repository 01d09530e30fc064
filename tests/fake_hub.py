"""A server that speaks the hub's API, for the real client: repositories, commits, large files, tokens, refusals."""

from __future__ import annotations

import base64
import contextlib
import dataclasses
import hashlib
import json
import re
import threading
from collections.abc import Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit


TOKEN = "hf_" + "a" * 34
OWNER = "someone"
_LARGE = 10_000  # bytes from which a file is stored as a large one
_KINDS = {"model": "", "dataset": "datasets/", "space": "spaces/"}


@dataclasses.dataclass
class Repo:
    """A repository: what each branch holds, and who may see it."""

    kind: str
    name: str
    private: bool = False
    gated: bool = False
    sdk: str | None = None
    branches: dict[str, str] = dataclasses.field(default_factory=dict)
    commits: dict[str, dict[str, bytes]] = dataclasses.field(default_factory=dict)

    def commit(self, branch: str, files: dict[str, bytes]) -> str:
        sha = hashlib.sha1(f"{self.kind}{self.name}{len(self.commits)}".encode()).hexdigest()
        self.commits[sha] = files
        self.branches[branch] = sha
        return sha

    def files(self, revision: str = "main") -> dict[str, bytes]:
        return self.commits[self.branches.get(revision, revision)]


class FakeHub:
    """
    Args:
        token (`str`): The token that it takes for that of `someone`.
    """

    def __init__(self, token: str = TOKEN):
        self.token = token
        self.repos: dict[tuple[str, str], Repo] = {}
        self.large: dict[str, bytes] = {}
        self.requests: list[str] = []
        self.unknown: list[str] = []
        self.cuts: dict[str, int] = {}
        """How many more uploads are cut off, by the digest of a large file."""
        self.endpoint = ""

    def add(self, name: str, files: dict[str, bytes], kind: str = "model", **settings) -> Repo:
        """A repository that is there already."""
        repo = self.repos[kind, name] = Repo(kind, name, **settings)
        repo.commit("main", {".gitattributes": b"", **files})
        return repo

    @contextlib.contextmanager
    def serve(self) -> Iterator[FakeHub]:
        hub = self

        class Handler(_Handler):
            def __init__(self, *args, **kwargs):
                self.hub = hub
                super().__init__(*args, **kwargs)

        server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        self.endpoint = f"http://127.0.0.1:{server.server_port}"
        thread = threading.Thread(target=server.serve_forever, daemon=True)
        thread.start()
        try:
            yield self
        finally:
            server.shutdown()
            server.server_close()

    def environment(self, home) -> dict[str, str]:
        """What a client's process needs to talk to this server and to nothing else."""
        return {
            "HF_ENDPOINT": self.endpoint,
            "HF_HOME": str(home),
            "HF_TOKEN": self.token,
            "HF_HUB_OFFLINE": "0",
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "HF_HUB_DISABLE_PROGRESS_BARS": "1",
        }


class _Answer(Exception):
    def __init__(self, status: int, body=None, code: str | None = None, message: str | None = None, headers=None):
        self.status = status
        self.body = body
        self.headers = dict(headers or {})
        if code:
            self.headers["X-Error-Code"] = code
        if message:
            self.headers["X-Error-Message"] = message


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: FakeHub

    def log_message(self, *args) -> None:
        pass

    def do_GET(self) -> None:
        self._answer()

    do_HEAD = do_POST = do_PUT = do_GET

    def _answer(self) -> None:
        path = urlsplit(self.path)
        self.query = parse_qs(path.query)
        self.hub.requests.append(f"{self.command} {unquote(path.path)}")
        length = int(self.headers.get("Content-Length") or 0)
        digest = path.path.split("/")[-1]
        if self.command == "PUT" and self.hub.cuts.get(digest, 0) > 0:
            self.hub.cuts[digest] -= 1
            self.rfile.read(length // 2)
            self.close_connection = True
            self.connection.close()
            return
        self.data = self.rfile.read(length)
        try:
            answer = _Answer(200, self._route(unquote(path.path)))
        except _Answer as refusal:
            answer = refusal
        self._send(answer)

    def _send(self, answer: _Answer) -> None:
        body = answer.body if isinstance(answer.body, bytes) else json.dumps(answer.body).encode()
        self.send_response(answer.status)
        for name, value in {"Content-Length": str(len(body)), **answer.headers}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    @property
    def _known(self) -> bool:
        """Whether the request brings the right token; one that is wrong is refused whatever it asks for."""
        given = self.headers.get("Authorization")
        if given is None:
            return False
        if given != f"Bearer {self.hub.token}":
            raise _Answer(401, {"error": "Invalid"}, message="Invalid credentials in Authorization header")
        return True

    def _route(self, path: str):
        known = self._known
        routes = [
            ("GET", r"/api/whoami-v2", self._whoami),
            ("POST", r"/api/validate-yaml", self._validate),
            ("POST", r"/api/repos/create", self._create),
            ("PUT", r"/large/(\w+)", self._upload),
            ("POST", r"/((?:datasets/|spaces/)?[^/]+/[^/]+)\.git/info/lfs/objects/batch", self._batch),
            ("GET", r"/api/(model|dataset|space)s/([^/]+/[^/]+)(?:/revision/(.+))?", self._info),
            ("GET", r"/api/(model|dataset|space)s/([^/]+/[^/]+)/refs", self._refs),
            ("GET", r"/api/(model|dataset|space)s/([^/]+/[^/]+)/tree/([^/]+)/?(.*)", self._tree),
            ("POST", r"/api/(model|dataset|space)s/([^/]+/[^/]+)/paths-info/(.+)", self._paths_info),
            ("POST", r"/api/(model|dataset|space)s/([^/]+/[^/]+)/branch/(.+)", self._branch),
            ("POST", r"/api/(model|dataset|space)s/([^/]+/[^/]+)/preupload/(.+)", self._preupload),
            ("POST", r"/api/(model|dataset|space)s/([^/]+/[^/]+)/commit/(.+)", self._commit),
            ("GET", r"/((?:datasets/|spaces/)?[^/]+/[^/]+)/resolve/([^/]+)/(.+)", self._resolve),
        ]
        for method, pattern, handle in routes:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                if method == "POST" and not known and "paths-info" not in path and "batch" not in path:
                    raise _Answer(401, {"error": "Log in"}, message="Invalid credentials in Authorization header")
                return handle(*match.groups())
        self.hub.unknown.append(f"{self.command} {path}")
        raise _Answer(404, {"error": "no such address"})

    def _repo(self, kind: str, name: str) -> Repo:
        repo = self.hub.repos.get((kind, name))
        if repo is None or (repo.private and not self._known):
            raise _Answer(404 if self._known else 401, {"error": "Repository not found"}, code="RepoNotFound")
        return repo

    def _revision(self, repo: Repo, revision: str | None) -> str:
        sha = repo.branches.get(revision or "main", revision)
        if sha not in repo.commits:
            raise _Answer(404, {"error": "Invalid rev id"}, code="RevisionNotFound")
        return sha

    def _whoami(self):
        if not self._known:
            raise _Answer(401, {"error": "Log in"}, message="Invalid credentials in Authorization header")
        return {"type": "user", "name": OWNER, "orgs": []}

    def _validate(self):
        """The hub looks at the metadata of a card before it takes it."""
        content = json.loads(self.data)["content"]
        if not re.search(r"^license: \S+$", content.split("---")[1], re.MULTILINE):
            raise _Answer(400, {"errors": [{"message": '"license" is required'}]})
        return {"errors": [], "warnings": []}

    def _create(self):
        asked = json.loads(self.data)
        kind, name = asked.get("type", "model"), f"{asked.get('organization') or OWNER}/{asked['name']}"
        if not name.startswith(f"{OWNER}/"):
            raise _Answer(403, {"error": f"You don't have the rights to create {name}"})
        if (kind, name) in self.hub.repos:
            raise _Answer(409, {"error": "You already created this repo", "url": f"{self.hub.endpoint}/{name}"})
        private = asked.get("visibility") == "private" or asked.get("private") is True
        repo = self.hub.add(name, {}, kind, private=private, sdk=asked.get("sdk"))
        return {"url": f"{self.hub.endpoint}/{_KINDS[kind]}{repo.name}", "id": name}

    def _info(self, kind: str, name: str, revision: str | None):
        repo = self._repo(kind, name)
        sha = self._revision(repo, revision)
        siblings = [{"rfilename": path} for path in repo.commits[sha]]
        facts = {"id": name, "sha": sha, "private": repo.private, "gated": repo.gated, "tags": [], "downloads": 0}
        return {**facts, "siblings": siblings, "likes": 0, "cardData": None, "disabled": False}

    def _refs(self, kind: str, name: str):
        repo = self._repo(kind, name)
        branches = [
            {"name": branch, "ref": f"refs/heads/{branch}", "targetCommit": sha}
            for branch, sha in repo.branches.items()
        ]
        return {"branches": branches, "tags": [], "converts": []}

    def _tree(self, kind: str, name: str, revision: str, folder: str):
        repo = self._repo(kind, name)
        files = repo.commits[self._revision(repo, revision)]
        inside = {path: data for path, data in files.items() if path.startswith(f"{folder}/" if folder else "")}
        if folder and not inside:
            raise _Answer(404, {"error": "no such folder"}, code="EntryNotFound")
        start = len(folder) + 1 if folder else 0
        if self.query.get("recursive", ["false"])[0].lower() == "true":
            shown = [_entry(path, data) for path, data in inside.items()]
            folders = {path.rsplit("/", 1)[0] for path in inside if "/" in path[start:]}
        else:
            shown = [_entry(path, data) for path, data in inside.items() if "/" not in path[start:]]
            folders = {path[:start] + path[start:].split("/")[0] for path in inside if "/" in path[start:]}
        return shown + [
            {"type": "directory", "path": path, "oid": _blob(path.encode()), "size": 0} for path in folders
        ]

    def _paths_info(self, kind: str, name: str, revision: str):
        repo = self._repo(kind, name)
        files = repo.commits[self._revision(repo, revision)]
        try:
            asked = json.loads(self.data)["paths"]
        except ValueError:
            asked = parse_qs(self.data.decode())["paths"]
        answers = [_entry(path, files[path]) for path in asked if path in files]
        folders = [path for path in asked if any(file.startswith(f"{path}/") for file in files)]
        return answers + [{"type": "directory", "path": path, "oid": _blob(b""), "size": 0} for path in folders]

    def _branch(self, kind: str, name: str, branch: str):
        repo = self._repo(kind, name)
        if branch in repo.branches:
            raise _Answer(409, {"error": "Reference already exists"})
        repo.branches[branch] = self._revision(repo, json.loads(self.data or b"{}").get("startingPoint"))
        return {}

    def _preupload(self, kind: str, name: str, revision: str):
        repo = self._repo(kind, name)
        files = repo.commits[self._revision(repo, revision)]
        answers = []
        for file in json.loads(self.data)["files"]:
            mode = "lfs" if file["size"] >= _LARGE else "regular"
            old = files.get(file["path"])
            answers.append(
                {
                    "path": file["path"],
                    "uploadMode": mode,
                    "shouldIgnore": False,
                    "oid": None if old is None else _entry(file["path"], old)["oid"],
                }
            )
        return {"files": answers}

    def _batch(self, name: str):
        answers = []
        for asked in json.loads(self.data)["objects"]:
            entry = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.large:
                entry["actions"] = {"upload": {"href": f"{self.hub.endpoint}/large/{asked['oid']}", "header": {}}}
            answers.append(entry)
        return {"transfer": "basic", "objects": answers}

    def _upload(self, oid: str):
        if hashlib.sha256(self.data).hexdigest() != oid:
            raise _Answer(400, {"error": "other bytes than announced"})
        self.hub.large[oid] = self.data
        return {}

    def _commit(self, kind: str, name: str, branch: str):
        repo = self._repo(kind, name)
        parent = self._revision(repo, branch)
        files = dict(repo.commits[parent])
        for line in self.data.splitlines():
            operation = json.loads(line)
            value = operation["value"]
            if operation["key"] == "header" and value.get("parentCommit") not in (None, parent):
                raise _Answer(412, {"error": "A commit has happened since. Please refresh and try again."})
            if operation["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif operation["key"] == "lfsFile":
                files[value["path"]] = self.hub.large[value["oid"]]
            elif operation["key"] == "deletedFile":
                del files[value["path"]]
        sha = repo.commit(branch, files)
        url = f"{self.hub.endpoint}/{_KINDS[kind]}{name}"
        return {"commitUrl": f"{url}/commit/{sha}", "commitOid": sha, "pullRequestUrl": None}

    def _resolve(self, full_name: str, revision: str, path: str):
        kind = {"datasets": "dataset", "spaces": "space"}.get(full_name.split("/")[0], "model")
        repo = self._repo(kind, full_name.removeprefix(_KINDS[kind]))
        if repo.gated:
            raise _Answer(403, {"error": "gated"}, code="GatedRepo")
        sha = self._revision(repo, revision)
        data = repo.commits[sha].get(path)
        if data is None:
            raise _Answer(404, {"error": "Entry not found"}, code="EntryNotFound", headers={"X-Repo-Commit": sha})
        start, end, status = 0, len(data), 200
        if asked := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range") or ""):
            start, end, status = int(asked[1]), int(asked[2] or end - 1) + 1, 206
        etag = _entry(path, data)
        etag = etag["lfs"]["oid"] if "lfs" in etag else etag["oid"]
        headers = {"X-Repo-Commit": sha, "ETag": f'"{etag}"', "Accept-Ranges": "bytes"}
        if status == 206:
            headers["Content-Range"] = f"bytes {start}-{end - 1}/{len(data)}"
        raise _Answer(status, data[start:end], headers=headers)


def _entry(path: str, data: bytes) -> dict:
    entry = {"type": "file", "path": path, "size": len(data), "oid": _blob(data)}
    if len(data) >= _LARGE:
        digest = hashlib.sha256(data).hexdigest()
        pointer = f"version https://git-lfs.github.com/spec/v1\noid sha256:{digest}\nsize {len(data)}\n".encode()
        entry |= {"oid": _blob(pointer), "lfs": {"oid": digest, "size": len(data), "pointerSize": len(pointer)}}
    return entry


def _blob(data: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()
