"""A minimal Hub on 127.0.0.1 that implements the HTTP API used by huggingface_hub, diffusers and datasets.

Repositories live in memory. Faults can be switched on by file name, to see what clients make of them.
"""

import base64
import hashlib
import json
import re
import threading
from collections import Counter
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

TOKEN = "hf_loopback"
LFS_SUFFIXES = (".safetensors", ".parquet")
RESOLVE = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)/resolve/([^/]+)/(.+)")
API = re.compile(r"/api/(models|datasets)/([^/]+/[^/]+?)(?:/(revision|tree|paths-info|preupload|commit|branch)(/.*)?)?")
LFS = re.compile(r"/(?:(datasets)/)?([^/]+/[^/]+)\.git/info/lfs/objects/batch")


def git_hash(content: bytes) -> str:
    return hashlib.sha1(b"blob %d\0" % len(content) + content).hexdigest()


@dataclass
class Repo:
    private: bool
    refs: dict[str, str] = field(default_factory=lambda: {"main": "0" * 40})
    commits: dict[str, dict[str, bytes]] = field(default_factory=lambda: {"0" * 40: {}})
    messages: list[str] = field(default_factory=list)

    def files(self, revision: str) -> dict[str, bytes] | None:
        return self.commits.get(self.refs.get(revision, revision))


class LoopbackHub:
    """The server; a context manager. `faults[path] = [kind, times]`, kinds: "cut", "500", "wrong"."""

    def __init__(self):
        self.repos: dict[tuple[str, str], Repo] = {}
        self.objects: dict[str, bytes] = {}
        self.faults: dict[str, list] = {}
        self.down = False
        self.requests: Counter = Counter()
        self.lock = threading.RLock()
        handler = type("Handler", (_Handler,), {"hub": self})
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
        self.server.daemon_threads = True
        self.url = f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self):
        threading.Thread(target=self.server.serve_forever, args=(0.05,), daemon=True).start()
        return self

    def __exit__(self, *_):
        self.server.shutdown()
        self.server.server_close()

    def put(self, repo_id: str, files: dict[str, bytes], private=False, kind="models") -> str:
        """Create a commit without a client."""
        repo = self.repos.setdefault((kind, repo_id), Repo(private))
        return self.commit(repo, "main", {**repo.files("main"), **files}, "put")

    def commit(self, repo: Repo, branch: str, files: dict[str, bytes], message: str) -> str:
        listing = "".join(f"{k}{git_hash(v)}" for k, v in sorted(files.items()))
        oid = hashlib.sha1(f"{len(repo.commits)}{listing}".encode()).hexdigest()
        repo.commits[oid] = files
        repo.refs[branch] = oid
        repo.messages.append(message)
        return oid

    def environment(self, cache, token: str | None = TOKEN, **more) -> dict[str, str]:
        """Environment variables that restrict a client process to this Hub."""
        values = {
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(cache),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "OMP_NUM_THREADS": "1",
            **more,
        }
        return {**values, "HF_TOKEN": token} if token else values


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    hub: LoopbackHub

    def log_message(self, *_):
        pass

    def do_GET(self):
        self.route()

    do_HEAD = do_POST = do_PUT = do_GET

    def route(self):
        length = int(self.headers.get("Content-Length") or 0)
        self.body = self.rfile.read(length)
        if self.headers.get("Transfer-Encoding") == "chunked":
            self.body = self.read_chunks()
        url = urlsplit(self.path)
        self.query = parse_qs(url.query)
        path = url.path
        with self.hub.lock:
            self.hub.requests[self.command] += 1
            if self.hub.down:
                return self.error(500, "InternalError")
            if path == "/api/repos/create":
                return self.create()
            if path == "/api/validate-yaml":
                return self.answer({"errors": [], "warnings": []})
            if path.startswith("/lfs/"):
                self.hub.objects[path.removeprefix("/lfs/")] = self.body
                return self.answer({})
            if match := LFS.fullmatch(path):
                return self.lfs_batch()
            if match := RESOLVE.fullmatch(path):
                kind = match[1] or "models"
                if repo := self.repo(kind, match[2]):
                    self.resolve(repo, unquote(match[3]), unquote(match[4]))
                return None
            if (match := API.fullmatch(path)) and (repo := self.repo(match[1], match[2])):
                action, rest = match[3] or "revision", (match[4] or "/main").removeprefix("/")
                revision, _, inside = rest.partition("/")
                return getattr(self, action.replace("-", "_"))(repo, match[2], unquote(revision), unquote(inside))
            if not API.fullmatch(path):
                return self.error(404, "NotFound")
            return None

    def read_chunks(self) -> bytes:
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def authorised(self) -> bool:
        return self.headers.get("Authorization") == f"Bearer {TOKEN}"

    def repo(self, kind: str, repo_id: str) -> Repo | None:
        repo = self.hub.repos.get((kind, repo_id))
        writes = self.command in ("POST", "PUT") and "paths-info" not in self.path
        if repo is None or ((repo.private or writes) and not self.authorised()):
            self.error(401 if repo is not None and not self.authorised() else 404, "RepoNotFound")
            return None
        return repo

    def create(self):
        if not self.authorised():
            return self.error(401, "Unauthorized")
        asked = json.loads(self.body)
        repo_id = f"{asked.get('organization') or 'user'}/{asked['name']}"
        key = (asked.get("type", "model") + "s", repo_id)
        status = 409 if key in self.hub.repos else 200
        self.hub.repos.setdefault(key, Repo(bool(asked.get("private")) or asked.get("visibility") == "private"))
        prefix = "datasets/" if key[0] == "datasets" else ""
        return self.answer({"url": f"{self.hub.url}/{prefix}{repo_id}", "name": repo_id, "id": repo_id}, status)

    def branch(self, repo, repo_id, name, _):
        status = 409 if name in repo.refs else 200
        repo.refs.setdefault(name, repo.refs["main"])
        return self.answer({}, status)

    def revision(self, repo, repo_id, revision, _):
        files = repo.files(revision)
        if files is None:
            return self.error(404, "RevisionNotFound")
        sha = repo.refs.get(revision, revision)
        siblings = [{"rfilename": p, "size": len(c)} for p, c in files.items()]
        info = {"_id": "1", "id": repo_id, "sha": sha, "private": repo.private, "siblings": siblings, "tags": []}
        return self.answer({**info, "downloads": 0, "likes": 0, "lastModified": "2026-01-01T00:00:00.000Z"})

    def entry(self, path: str, content: bytes) -> dict:
        entry = {"type": "file", "path": path, "size": len(content), "oid": git_hash(content)}
        if path.endswith(LFS_SUFFIXES):
            digest = hashlib.sha256(content).hexdigest()
            entry["lfs"] = {"oid": digest, "size": len(content), "pointerSize": 134}
        return entry

    def entries(self, files: dict[str, bytes], folder: str = "", recursive: bool = True) -> list[dict]:
        prefix, found, folders = f"{folder}/" if folder else "", [], set()
        for path, content in files.items():
            if path.startswith(prefix):
                inside = path.removeprefix(prefix)
                if "/" in inside:
                    folders.add(prefix + inside.split("/")[0])
                if recursive or "/" not in inside:
                    found.append(self.entry(path, content))
        return found + [{"type": "directory", "path": p, "oid": "0" * 40} for p in sorted(folders)]

    def tree(self, repo, repo_id, revision, folder):
        files = repo.files(revision)
        if files is None:
            return self.error(404, "RevisionNotFound")
        recursive = self.query.get("recursive", ["false"])[0].lower() in ("true", "1")
        found = self.entries(files, folder, recursive)
        return self.answer(found) if found or not folder else self.error(404, "EntryNotFound")

    def paths_info(self, repo, repo_id, revision, _):
        files = repo.files(revision)
        if files is None:
            return self.error(404, "RevisionNotFound")
        body = self.body.decode()
        wanted = json.loads(body)["paths"] if body.startswith("{") else parse_qs(body).get("paths", [])
        every = self.entries(files)
        return self.answer([e for e in every if e["path"] in wanted])

    def preupload(self, repo, repo_id, revision, _):
        files = repo.files(revision)
        if files is None:
            return self.error(404, "RevisionNotFound")
        modes = []
        for asked in json.loads(self.body)["files"]:
            path, old = asked["path"], files.get(asked["path"])
            mode = "lfs" if path.endswith(LFS_SUFFIXES) else "regular"
            oid = None
            if old is not None:
                oid = hashlib.sha256(old).hexdigest() if mode == "lfs" else git_hash(old)
            modes.append({"path": path, "uploadMode": mode, "shouldIgnore": False, "oid": oid})
        return self.answer({"files": modes})

    def lfs_batch(self):
        objects = []
        for asked in json.loads(self.body)["objects"]:
            answer = {"oid": asked["oid"], "size": asked["size"]}
            if asked["oid"] not in self.hub.objects:
                answer["actions"] = {"upload": {"href": f"{self.hub.url}/lfs/{asked['oid']}", "header": {}}}
            objects.append(answer)
        return self.answer({"transfer": "basic", "objects": objects})

    def commit(self, repo, repo_id, revision, _):
        files = repo.files(revision)
        if files is None:
            return self.error(404, "RevisionNotFound")
        files, message = dict(files), ""
        for line in self.body.decode().splitlines():
            step = json.loads(line)
            value = step["value"]
            if step["key"] == "header":
                message = value["summary"]
            elif step["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif step["key"] == "lfsFile":
                content = self.hub.objects.get(value["oid"])
                if content is None or hashlib.sha256(content).hexdigest() != value["oid"]:
                    return self.error(400, "LfsObjectMissing")
                files[value["path"]] = content
            elif step["key"] == "deletedFile":
                files.pop(value["path"], None)
        pull_request = self.query.get("create_pr", ["0"])[0] in ("1", "true", "True")
        number = sum(r.startswith("refs/pr/") for r in repo.refs) + 1
        oid = self.hub.commit(repo, f"refs/pr/{number}" if pull_request else revision, files, message)
        answer = {"success": True, "commitOid": oid, "commitUrl": f"{self.hub.url}/{repo_id}/commit/{oid}"}
        if pull_request:
            answer["pullRequestUrl"] = f"{self.hub.url}/{repo_id}/discussions/{number}"
        return self.answer(answer)

    def resolve(self, repo, revision, path):
        files = repo.files(revision)
        if files is None:
            return self.error(404, "RevisionNotFound")
        if path not in files:
            return self.error(404, "EntryNotFound")
        content = files[path]
        fault = self.hub.faults.get(path)
        kind = fault[0] if fault and fault[1] > 0 and self.command == "GET" else None
        if kind:
            fault[1] -= 1
        if kind == "500":
            return self.error(500, "InternalError")
        is_lfs = path.endswith(LFS_SUFFIXES)
        etag = hashlib.sha256(content).hexdigest() if is_lfs else git_hash(content)
        if kind == "wrong":
            content = content[:-1] + bytes([content[-1] ^ 1])
        first, last, status = 0, len(content) - 1, 200
        if wanted := re.fullmatch(r"bytes=(\d+)-(\d*)", self.headers.get("Range", "")):
            first, last, status = int(wanted[1]), min(int(wanted[2] or last), last), 206
        part = content[first : last + 1]
        self.send_response(status)
        self.send_header("ETag", f'"{etag}"')
        if is_lfs:
            self.send_header("X-Linked-Etag", f'"{etag}"')
            self.send_header("X-Linked-Size", str(len(content)))
        self.send_header("X-Repo-Commit", repo.refs.get(revision, revision))
        self.send_header("Accept-Ranges", "bytes")
        if status == 206:
            self.send_header("Content-Range", f"bytes {first}-{last}/{len(content)}")
        self.send_header("Content-Length", str(len(part)))
        self.end_headers()
        if self.command == "HEAD":
            return None
        if kind == "cut":
            self.wfile.write(part[: len(part) // 2])
            self.wfile.flush()
            self.close_connection = True
            return self.connection.close()
        return self.wfile.write(part)

    def answer(self, value, status: int = 200):
        body = json.dumps(value).encode()
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def error(self, status: int, code: str):
        self.send_response(status)
        self.send_header("X-Error-Code", code)
        self.send_header("X-Error-Message", code)
        body = json.dumps({"error": code}).encode()
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)
