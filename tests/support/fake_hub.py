"""A fake hub: a small HTTP server that implements the requests of huggingface_hub to download and push a model."""

import base64
import hashlib
import json
import re
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from threading import Thread

TOKENS = {"hf_writer": "alice", "hf_reader": None}  # and the user whose repositories they may write


class Hub(ThreadingHTTPServer):
    """A fake hub. `repos` is {user/name: {commit: {file: bytes}}}, main the last commit; `asked` has all requests."""

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Answers)
        self.url = f"http://127.0.0.1:{self.server_address[1]}"
        self.repos, self.asked, self.large, self.created = {}, [], {}, {}

    def commit(self, repo: str, files: dict[str, bytes]) -> str:
        history = self.repos.setdefault(repo, {})
        now = (list(history.values()) or [{}])[-1] | files
        name = hashlib.sha1(repr((len(history), sorted(now))).encode()).hexdigest()
        history[name] = now
        return name


class Answers(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def log_message(self, *args) -> None:
        pass

    def answer(self, content: bytes | dict = b"", status: int = 200, **headers: str) -> None:
        content = json.dumps(content).encode() if isinstance(content, dict) else content
        self.send_response(status)
        for name, value in ({"Content-Length": str(len(content))} | headers).items():
            self.send_header(name.replace("_", "-"), value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def refuse(self, status: int, code: str = "", message: str = "") -> None:
        self.answer({"error": message}, status, **({"X_Error_Code": code} if code else {}), X_Error_Message=message)

    def body(self) -> bytes:
        return self.rfile.read(int(self.headers.get("Content-Length", 0)))

    @property
    def token(self) -> str:
        return self.headers.get("Authorization", "").removeprefix("Bearer ")

    # ---- fetching

    def do_GET(self) -> None:
        self.server.asked.append((self.command, self.path))
        if (match := re.fullmatch(r"/([\w.-]+/[\w.-]+)/resolve/([^/]+)/(.+)", self.path.split("?")[0])) is None:
            return self.refuse(404)
        repo, revision, name = match.groups()
        history = self.server.repos.get(repo)
        if history is None:
            return self.refuse(401, "RepoNotFound", "Repository not found")  # as the hub does if there is no token
        if repo.startswith("gated/"):
            return self.refuse(403, "GatedRepo", "Access is restricted")
        commit = list(history)[-1] if revision == "main" else revision
        if commit not in history:
            return self.refuse(404, "RevisionNotFound", "Invalid rev id")
        if name not in history[commit]:
            return self.refuse(404, "EntryNotFound", "Entry not found")
        content = history[commit][name]
        etag = f'"{hashlib.sha256(content).hexdigest()}"'
        return self.answer(content, X_Repo_Commit=commit, ETag=etag)

    do_HEAD = do_GET  # noqa: N815

    # ---- pushing

    def do_POST(self) -> None:
        self.server.asked.append((self.command, self.path))
        body, path = self.body(), self.path.split("?")[0]
        if path == "/api/validate-yaml":
            return self.answer({"warnings": [], "errors": []})
        if self.token not in TOKENS:
            return self.refuse(401, message="Invalid username or password.")
        if path == "/api/repos/create":
            asked = json.loads(body)
            user = asked["organization"] or TOKENS[self.token]
            repo = f"{user}/{asked['name']}"
            if TOKENS[self.token] != user:
                return self.refuse(403, message="You don't have the rights to create a model under this namespace")
            if repo in self.server.repos:
                return self.answer({"url": f"{self.server.url}/{repo}", "error": "exists"}, 409)
            self.server.created[repo] = asked
            self.server.commit(repo, {".gitattributes": b""})
            return self.answer({"url": f"{self.server.url}/{repo}", "name": repo, "id": "1"})
        if path.endswith("/info/lfs/objects/batch"):
            objects = [
                one | {"actions": {"upload": {"href": f"{self.server.url}/large/{one['oid']}"}}}
                for one in json.loads(body)["objects"]
            ]
            return self.answer({"transfer": "basic", "objects": objects})
        if match := re.fullmatch(r"/api/models/(.+/.+)/preupload/main", path):
            modes = [
                {
                    "path": file["path"],
                    "uploadMode": "lfs" if file["path"].endswith(".safetensors") else "regular",
                    "shouldIgnore": False,
                    "oid": None,
                }
                for file in json.loads(body)["files"]
            ]
            return self.answer({"files": modes})
        if match := re.fullmatch(r"/api/models/(.+/.+)/commit/main", path):
            files = {}
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    files[value["path"]] = base64.b64decode(value["content"])
                elif line["key"] == "lfsFile":
                    files[value["path"]] = self.server.large[value["oid"]]
            commit = self.server.commit(match[1], files)
            url = f"{self.server.url}/{match[1]}/commit/{commit}"
            return self.answer({"success": True, "commitOid": commit, "commitUrl": url, "hookOutput": ""})
        return self.refuse(404)

    def do_PUT(self) -> None:
        self.server.asked.append((self.command, self.path))
        content = self.body()
        if hashlib.sha256(content).hexdigest() != self.path.split("/")[-1]:
            return self.refuse(400)
        self.server.large[self.path.split("/")[-1]] = content
        return self.answer()


@contextmanager
def running_hub():
    with Hub() as hub:
        Thread(target=hub.serve_forever, daemon=True).start()
        try:
            yield hub
        finally:
            hub.shutdown()
