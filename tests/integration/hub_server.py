"""A hub of one process: the routes that publishing and loading models and datasets need, everything in memory."""

import base64
import hashlib
import json
import re
import threading
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

# Addresses of a dataset's files, unlike a model's, say what it is. A model and a dataset cannot share a name here.
REPO = r"(?P<repo>[\w.-]+/[\w.-]+)"
API, FILES = rf"/api/(?:models|datasets)/{REPO}", rf"/(?:datasets/)?{REPO}"


class Hub(ThreadingHTTPServer):
    """Commits are dictionaries of path -> bytes, the newest last; `repos[name]["commits"]` has them all."""

    def __init__(self):
        super().__init__(("127.0.0.1", 0), Handler)
        self.repos, self.large_files = {}, {}
        self.refuse_large_files = False
        threading.Thread(target=self.serve_forever, daemon=True).start()

    @property
    def endpoint(self):
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *arguments):
        pass

    def answer(self, status=200, content=None, **headers):
        body = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": len(body), **headers}.items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def handle_one_route(self):
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        path = self.path.split("?")[0]
        for method, pattern, action in ROUTES:
            match = re.fullmatch(pattern, path)
            if match and method == self.command.replace("HEAD", "GET"):
                names = match.groupdict()
                if "repo" in names and names["repo"] not in self.server.repos:
                    return self.answer(404, {"error": "not found"}, X_Error_Code="RepoNotFound")
                return action(self, body, **names)
        return self.answer(404, {"error": f"no route {self.command} {path}"})

    do_GET = do_HEAD = do_POST = do_PUT = handle_one_route

    def create(self, body):
        settings = json.loads(body)
        name = f"{settings['organization']}/{settings['name']}"
        if name in self.server.repos:
            return self.answer(409, {"error": "exists", "url": f"{self.server.endpoint}/{name}"})
        private = bool(settings.get("private")) or settings.get("visibility") == "private"
        self.server.repos[name] = {"private": private, "commits": [("0" * 40, {".gitattributes": b""})]}
        return self.answer(200, {"url": f"{self.server.endpoint}/{name}"})

    def validate(self, body):
        self.answer(200, {"errors": [], "warnings": []})

    def commit_of(self, repo, revision):
        commits = dict(self.server.repos[repo]["commits"])
        revision = list(commits)[-1] if revision in (None, "main") else revision
        return revision, commits[revision]

    def info(self, body, repo, revision=None):
        sha, files = self.commit_of(repo, revision)
        private = self.server.repos[repo]["private"]
        siblings = [{"rfilename": name} for name in files]
        self.answer(
            200, {"id": repo, "modelId": repo, "sha": sha, "private": private, "siblings": siblings, "tags": []}
        )

    def tree(self, body, repo, revision, folder=None):
        sha, files = self.commit_of(repo, revision)
        start = f"{folder}/" if folder else ""
        inside = {name[len(start) :] for name in files if name.startswith(start)}
        if folder and not inside:
            return self.answer(404, {"error": "no folder"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        entries = dict.fromkeys(inside, "file")
        if "recursive=true" not in self.path.lower():
            entries = {name.split("/")[0]: "directory" if "/" in name else "file" for name in inside}
        paths = {start + name: kind for name, kind in entries.items()}
        return self.answer(
            200, [{"type": kind, "path": p, "size": len(files.get(p, b"")), "oid": p} for p, kind in paths.items()]
        )

    def preupload(self, body, repo):
        modes = {True: "lfs", False: "regular"}
        files = [file["path"] for file in json.loads(body)["files"]]
        large = {path: path.endswith((".safetensors", ".png", ".parquet")) for path in files}
        self.answer(200, {"files": [{"path": p, "uploadMode": modes[large[p]], "shouldIgnore": False} for p in files]})

    def large_batch(self, body, repo):
        objects = json.loads(body)["objects"]
        for each in objects:
            each["actions"] = {"upload": {"href": f"{self.server.endpoint}/upload/{each['oid']}"}}
        self.answer(200, {"transfer": "basic", "objects": objects})

    def upload(self, body, oid):
        if self.server.refuse_large_files:
            return self.answer(403, {"error": "storage is full"})
        assert hashlib.sha256(body).hexdigest() == oid
        self.server.large_files[oid] = body
        return self.answer(200, {})

    def commit(self, body, repo):
        parent, files = self.commit_of(repo, "main")
        files = dict(files)
        for line in map(json.loads, body.splitlines()):
            value = line["value"]
            if line["key"] == "header" and value.get("parentCommit") not in (None, parent):
                return self.answer(412, {"error": "a commit has happened since"})
            if line["key"] == "file":
                files[value["path"]] = base64.b64decode(value["content"])
            elif line["key"] == "lfsFile":
                files[value["path"]] = self.server.large_files[value["oid"]]
            elif line["key"] == "deletedFile":
                del files[value["path"]]
        sha = hashlib.sha1(parent.encode() + body).hexdigest()
        self.server.repos[repo]["commits"].append((sha, files))
        url = f"{self.server.endpoint}/{repo}/commit/{sha}"
        return self.answer(200, {"commitUrl": url, "commitOid": sha, "pullRequestUrl": None})

    def resolve(self, body, repo, revision, path):
        sha, files = self.commit_of(repo, revision)
        if path not in files:
            return self.answer(404, {"error": "no file"}, X_Error_Code="EntryNotFound", X_Repo_Commit=sha)
        etag = f'"{hashlib.sha256(files[path]).hexdigest()}"'
        return self.answer(200, files[path], ETag=etag, X_Repo_Commit=sha)


ROUTES = [
    ("POST", "/api/repos/create", Handler.create),
    ("POST", "/api/validate-yaml", Handler.validate),
    ("GET", API, Handler.info),
    ("GET", f"{API}/revision/(?P<revision>[^/]+)", Handler.info),
    ("GET", f"{API}/tree/(?P<revision>[^/]+)(?:/(?P<folder>.+))?", Handler.tree),
    ("POST", f"{API}/preupload/main", Handler.preupload),
    ("POST", rf"{FILES}\.git/info/lfs/objects/batch", Handler.large_batch),
    ("PUT", "/upload/(?P<oid>[0-9a-f]{64})", Handler.upload),
    ("POST", f"{API}/commit/main", Handler.commit),
    ("GET", f"{FILES}/resolve/(?P<revision>[^/]+)/(?P<path>.+)", Handler.resolve),
]
