"""A Hub on the loopback, for the real `huggingface_hub` client. It keeps models and data sets in memory.

It can create repositories, take pushes (preupload, LFS, commit), and serve branches, tags, lists, files, whoami and private repositories. Its errors
have the headers that the client reads. A test can make it fail in the middle of a push, and start it again with all its data.
"""

from __future__ import annotations

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

import yaml

USER = "tester"
WRITE, READ = "hf_may_write", "hf_may_read"
LFS = (".parquet", ".safetensors", ".bin", ".pt", ".pth", ".pkl")


class HubError(Exception):
    def __init__(self, status: int, message: str, code: str | None = None):
        super().__init__(message)
        self.status, self.code = status, code


class Repository:
    def __init__(self, name: str, private: bool):
        self.name, self.private = name, private
        self.commits: dict[str, dict[str, bytes]] = {}
        self.heads: dict[str, str] = {}  # branches and tags
        self.log: list[tuple[str, str]] = []  # (branch, message), oldest first
        self.commit("main", {}, "initial commit")

    def commit(self, branch: str, files: dict[str, bytes], message: str) -> str:
        oid = hashlib.sha1(repr((self.name, branch, message, len(self.commits))).encode()).hexdigest()
        self.commits[oid] = files
        self.heads[branch] = oid
        self.log.append((branch, message))
        return oid

    def sha(self, revision: str) -> str:
        found = self.heads.get(revision, revision)
        if found not in self.commits:
            raise HubError(404, f"Invalid rev id: {revision}", "RevisionNotFound")
        return found


class LoopbackHub:
    """`with LoopbackHub() as hub:` serves at `hub.endpoint`, on 127.0.0.1.

    Attributes:
        repositories: by their ids.
        requests: "METHOD /path", in order.
        die_at: the server goes down, without an answer, at the first request whose "METHOD /path" holds this text.
        refuse: text in "METHOD /path" -> (status, how often); such requests get the status and nothing happens.
    """

    def __init__(self):
        self.repositories: dict[str, Repository] = {}
        self.objects: dict[str, bytes] = {}  # of LFS, by SHA-256
        self.requests: list[str] = []
        self.die_at: str | None = None
        self.refuse: dict[str, list[int]] = {}
        self.port = 0
        self._server: ThreadingHTTPServer | None = None

    def __enter__(self) -> LoopbackHub:
        self.start()
        return self

    def __exit__(self, *_) -> None:
        self.stop()

    @property
    def endpoint(self) -> str:
        return f"http://127.0.0.1:{self.port}"

    def start(self) -> None:
        """Starts, or starts again on the same port."""
        hub = self

        class Handler(_Handler):
            pass

        Handler.hub = hub
        self.die_at = None
        self._server = ThreadingHTTPServer(("127.0.0.1", self.port), Handler)
        self._server.daemon_threads = True
        self.port = self._server.server_address[1]
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.05}, daemon=True).start()

    def stop(self) -> None:
        server, self._server = self._server, None
        if server is not None:
            server.shutdown()
            server.server_close()

    @property
    def running(self) -> bool:
        return self._server is not None

    def files(self, repository: str, revision: str = "main") -> dict[str, bytes]:
        repo = self.repositories[repository]
        return repo.commits[repo.sha(revision)]

    def add(self, repository: str, files: dict[str, bytes], private: bool = False) -> None:
        """A repository, as if somebody had pushed it."""
        self.repositories[repository] = Repository(repository, private)
        self.repositories[repository].commit("main", files, "as given")


class _Handler(BaseHTTPRequestHandler):
    hub: LoopbackHub
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def _answer(self) -> None:
        url = urlsplit(self.path)
        path, query = unquote(url.path), parse_qs(url.query)
        path = re.sub("^/datasets/", "/", path.replace("/api/datasets/", "/api/models/", 1))  # they share their names with models
        line = f"{self.command} {path}"
        body = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        hub = self.hub
        if not hub.running or (hub.die_at is not None and hub.die_at in line):
            self.close_connection = True
            if hub.running:
                hub.stop()
            return
        hub.requests.append(line)
        try:
            for text, (status, times) in hub.refuse.items():
                if text in line and times > 0:
                    hub.refuse[text][1] -= 1
                    raise HubError(status, "made to fail")
            for method, pattern, answer in ROUTES:
                match = re.fullmatch(pattern, path)
                if match and method == self.command:
                    answer(self, *match.groups(), body=body, query=query)
                    return
            raise HubError(404, f"no such route: {line}")
        except HubError as error:
            headers = {"X-Error-Message": str(error), **({"X-Error-Code": error.code} if error.code else {})}
            self._send({"error": str(error)}, error.status, headers)

    do_GET = do_HEAD = do_POST = do_PUT = do_DELETE = _answer

    def _send(self, content, status: int = 200, headers: dict[str, str] | None = None) -> None:
        data = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Type": "application/json", "Content-Length": str(len(data)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(data)

    # -- who asks ---------------------------------------------------------------------------------------------------------

    def _role(self) -> str | None:
        header = self.headers.get("Authorization")
        if header is None:
            return None
        role = {f"Bearer {WRITE}": "write", f"Bearer {READ}": "read"}.get(header)
        if role is None:
            raise HubError(401, "Invalid credentials in Authorization header")
        return role

    def _repo(self, name: str, write: bool = False) -> Repository:
        role = self._role()
        repo = self.hub.repositories.get(name)
        if repo is None or (repo.private and role is None):
            # as the Hub does: strangers are not told whether it exists
            raise HubError(404 if role else 401, "Repository not found", "RepoNotFound")
        if write and role != "write":
            raise HubError(403, "Forbidden: you must use a write token to upload to a repository.")
        return repo

    # -- routes -----------------------------------------------------------------------------------------------------------

    def whoami(self, body, query):
        role = self._role()
        if role is None:
            raise HubError(401, "Invalid username or password.")
        token = {"type": "access_token", "accessToken": {"displayName": "test", "role": role}}
        self._send({"type": "user", "name": USER, "orgs": [], "auth": token})

    def create(self, body, query):
        wanted = json.loads(body)
        name = f"{wanted.get('organization') or USER}/{wanted['name']}"
        if self._role() != "write":
            raise HubError(403, f"You don't have the rights to create a model under the namespace {USER!r}")
        url = {"url": f"{self.hub.endpoint}/{name}", "name": name}
        if name in self.hub.repositories:
            self._send({"error": "You already created this model repo", **url}, 409)
            return
        self.hub.repositories[name] = Repository(name, private=wanted.get("visibility") == "private")
        self._send(url)

    def validate_yaml(self, body, query):
        content = json.loads(body)["content"]
        errors = []
        try:
            data = yaml.safe_load(content.split("---\n")[1])
            for result in data["model-index"][0]["results"] if "model-index" in data else []:
                if not (result["task"]["type"] and result["dataset"]["type"] and result["dataset"]["name"] and result["metrics"]):
                    errors.append({"message": "model-index is incomplete"})
                if not all(isinstance(metric["value"], float) and metric["type"] for metric in result["metrics"]):
                    errors.append({"message": "a metric has no value"})
        except Exception as error:
            errors.append({"message": f"{type(error).__name__}: {error}"})
        self._send({"errors": errors, "warnings": []}, 400 if errors else 200)

    def preupload(self, name, revision, body, query):
        repo = self._repo(name, write=True)
        repo.sha(revision)
        modes = [
            {"path": file["path"], "uploadMode": "lfs" if file["path"].endswith(LFS) else "regular", "shouldIgnore": False}
            for file in json.loads(body)["files"]
        ]
        self._send({"files": modes})

    def lfs_batch(self, name, body, query):
        self._repo(name, write=True)
        objects = []
        for wanted in json.loads(body)["objects"]:
            known = {"oid": wanted["oid"], "size": wanted["size"]}
            if wanted["oid"] not in self.hub.objects:
                known["actions"] = {
                    "upload": {"href": f"{self.hub.endpoint}/lfs/{wanted['oid']}"},
                    "verify": {"href": f"{self.hub.endpoint}/{name}.git/info/lfs/verify"},
                }
            objects.append(known)
        self._send({"transfer": "basic", "objects": objects})

    def lfs_put(self, oid, body, query):
        if hashlib.sha256(body).hexdigest() != oid:
            raise HubError(400, "the content is not that of its oid")
        self.hub.objects[oid] = body
        self._send(b"")

    def lfs_verify(self, name, body, query):
        wanted = json.loads(body)
        if len(self.hub.objects.get(wanted["oid"], b"")) != wanted["size"]:
            raise HubError(404, "Object not found")
        self._send({})

    def commit(self, name, revision, body, query):
        repo = self._repo(name, write=True)
        files, message = dict(repo.commits[repo.sha(revision)]), ""
        for line in map(json.loads, body.splitlines()):
            kind, value = line["key"], line["value"]
            if kind == "header":
                message = value["summary"]
            elif kind == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif kind == "lfsFile":
                if value["oid"] not in self.hub.objects:
                    raise HubError(400, "LFS object was never uploaded")
                files[value["path"]] = self.hub.objects[value["oid"]]
            elif kind == "deletedFile":
                files.pop(value["path"], None)
            else:
                raise HubError(400, f"unknown operation {kind}")
        oid = repo.commit(revision, files, message)
        self._send({"success": True, "commitOid": oid, "commitUrl": f"{self.hub.endpoint}/{name}/commit/{oid}"})

    def info(self, name, revision=None, *, body, query):
        repo = self._repo(name)
        sha = repo.sha(revision or "main")
        files = [{"rfilename": path} for path in sorted(repo.commits[sha])]
        tags = ["transformers"]
        self._send({"_id": "0", "id": name, "modelId": name, "sha": sha, "private": repo.private, "tags": tags, "siblings": files})

    def tree(self, name, revision, below=None, *, body, query):
        repo = self._repo(name)
        files = repo.commits[repo.sha(revision)]
        prefix = f"{below}/" if below else ""
        rows = [self._entry(path, data) for path, data in sorted(files.items()) if path.startswith(prefix)]
        if query.get("recursive") != ["true"] and query.get("recursive") != ["True"]:
            rows = [row for row in rows if "/" not in row["path"].removeprefix(prefix)]
        if below and not rows:
            raise HubError(404, f"{below} does not exist", "EntryNotFound")
        self._send(rows)

    def paths(self, name, revision, body, query):
        repo = self._repo(name)
        files = repo.commits[repo.sha(revision)]
        self._send([self._entry(path, files[path]) for path in json.loads(body)["paths"] if path in files])

    def branch(self, name, branch, body, query):
        repo = self._repo(name, write=True)
        if branch in repo.heads:
            raise HubError(409, "Reference already exists")
        start = json.loads(body or b"{}").get("startingPoint") or "main"
        repo.heads[branch] = repo.sha(start)
        self._send({})

    def tag(self, name, revision, body, query):
        repo = self._repo(name, write=True)
        repo.heads[json.loads(body)["tag"]] = repo.sha(revision)
        self._send({})

    def refs(self, name, body, query):
        repo = self._repo(name)
        branches = [{"name": key, "ref": f"refs/heads/{key}", "targetCommit": sha} for key, sha in repo.heads.items()]
        self._send({"branches": branches, "tags": [], "converts": []})

    def resolve(self, name, revision, path, body, query):
        repo = self._repo(name)
        sha = repo.sha(revision)
        data = repo.commits[sha].get(path)
        commit = {"X-Repo-Commit": sha}
        if data is None:
            self._send({"error": "Entry not found"}, 404, {**commit, "X-Error-Code": "EntryNotFound", "X-Error-Message": "Entry not found"})
            return
        oid = self._oid(path, data)
        headers = {**commit, "ETag": f'"{oid}"', "Content-Type": "application/octet-stream", "Accept-Ranges": "bytes"}
        if path.endswith(LFS):
            headers |= {"X-Linked-ETag": f'"{oid}"', "X-Linked-Size": str(len(data))}
        wanted = re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", ""))
        if wanted:
            first, last = int(wanted[1]), int(wanted[2] or len(data) - 1)
            headers["Content-Range"] = f"bytes {first}-{last}/{len(data)}"
            self._send(data[first : last + 1], 206, headers)
        else:
            self._send(data, 200, headers)

    @staticmethod
    def _oid(path: str, data: bytes) -> str:
        if path.endswith(LFS):
            return hashlib.sha256(data).hexdigest()
        return hashlib.sha1(b"blob %d\0" % len(data) + data).hexdigest()

    def _entry(self, path: str, data: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(data), "oid": self._oid(path, data)}
        if path.endswith(LFS):
            entry["lfs"] = {"oid": entry["oid"], "size": len(data), "pointerSize": 130}
        return entry


NAME = r"([\w.-]+/[\w.-]+)"
ROUTES = (
    ("GET", "/api/whoami-v2", _Handler.whoami),
    ("POST", "/api/repos/create", _Handler.create),
    ("POST", "/api/validate-yaml", _Handler.validate_yaml),
    ("POST", f"/api/models/{NAME}/preupload/(.+)", _Handler.preupload),
    ("POST", f"/{NAME}.git/info/lfs/objects/batch", _Handler.lfs_batch),
    ("PUT", "/lfs/([0-9a-f]{64})", _Handler.lfs_put),
    ("POST", f"/{NAME}.git/info/lfs/verify", _Handler.lfs_verify),
    ("POST", f"/api/models/{NAME}/commit/(.+)", _Handler.commit),
    ("GET", f"/api/models/{NAME}", _Handler.info),
    ("GET", f"/api/models/{NAME}/revision/(.+)", _Handler.info),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)", _Handler.tree),
    ("GET", f"/api/models/{NAME}/tree/([^/]+)/(.+)", _Handler.tree),
    ("POST", f"/api/models/{NAME}/paths-info/(.+)", _Handler.paths),
    ("POST", f"/api/models/{NAME}/branch/(.+)", _Handler.branch),
    ("POST", f"/api/models/{NAME}/tag/(.+)", _Handler.tag),
    ("GET", f"/api/models/{NAME}/refs", _Handler.refs),
    ("GET", f"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
    ("HEAD", f"/{NAME}/resolve/([^/]+)/(.+)", _Handler.resolve),
)
