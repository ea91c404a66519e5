"""A stand-in for the HTTP API of the Hugging Face hub: enough to create a model repository, upload a folder to it
as regular files (a real hub takes large files through its storage, with another protocol), and download one."""

import base64
import hashlib
import json
import re
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any


class Hub(ThreadingHTTPServer):
    """Repositories by name; a request without the token `hf_good` is refused.

    Attributes:
        repositories: `{name: {"private": bool, "files": {path: bytes}}}`.
    """

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.repositories: dict[str, dict[str, Any]] = {}
        self.requests: list[str] = []

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server_port}"


class Handler(BaseHTTPRequestHandler):
    server: Hub

    def log_message(self, *args: Any) -> None:
        pass

    def do_GET(self) -> None:
        self._answer(self._route)

    do_POST = do_PUT = do_HEAD = do_GET

    def _answer(self, route: Callable[[str, bytes], tuple[int, Any]]) -> None:
        body = self._body()
        self.server.requests.append(f"{self.command} {self.path}")
        if self.headers.get("Authorization") != "Bearer hf_good":
            code, answer = 401, {"error": "Invalid credentials"}
        else:
            code, answer = route(self.path.split("?")[0], body)
        content = answer if isinstance(answer, bytes) else json.dumps(answer).encode()
        self.send_response(code)
        self.send_header("ETag", f'"{hashlib.sha1(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", "0" * 40)
        if code == 404:
            self.send_header("X-Error-Code", "EntryNotFound" if "/resolve/" in self.path else "RepoNotFound")
        self.send_header("Content-Length", str(len(content)))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(content)

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding") == "chunked":
            chunks = []
            while size := int(self.rfile.readline(), 16):
                chunks.append(self.rfile.read(size))
                self.rfile.readline()
            self.rfile.readline()
            return b"".join(chunks)
        return self.rfile.read(int(self.headers.get("Content-Length") or 0))

    def _route(self, path: str, body: bytes) -> tuple[int, Any]:
        hub = self.server
        if path == "/api/repos/create":
            asked = json.loads(body)
            name = "/".join(filter(None, (asked.get("organization"), asked["name"])))
            if name in hub.repositories:
                return 409, {"error": "exists", "url": f"{hub.url}/{name}"}
            private = asked.get("visibility") == "private" or bool(asked.get("private"))
            hub.repositories[name] = {"private": private, "files": {}}
            return 200, {"url": f"{hub.url}/{name}"}
        if path == "/api/validate-yaml":
            unknown = re.search("^license: (?!apache-2.0|mit).*$", json.loads(body)["content"], re.MULTILINE)
            if unknown:
                return 400, {"errors": [{"message": f'"{unknown[0]}" is not a licence'}], "warnings": []}
            return 200, {"errors": [], "warnings": []}
        if "/resolve/" in path:
            name, _, file = re.sub("/resolve/[^/]+/", "//", path.strip("/")).partition("//")
            content = hub.repositories[name]["files"].get(file)
            return (404, {"error": "Entry not found"}) if content is None else (200, content)
        name = "/".join(path.removeprefix("/api/models/").split("/")[:2])
        if name not in hub.repositories:
            return 404, {"error": "Repository not found"}
        return self._repository(hub.repositories[name], name, path, body)

    def _repository(self, repository: dict[str, Any], name: str, path: str, body: bytes) -> tuple[int, Any]:
        hub = self.server
        if "/preupload/" in path:
            files = [{"path": each["path"], "uploadMode": "regular"} for each in json.loads(body)["files"]]
            return 200, {"files": [{**each, "shouldIgnore": False} for each in files]}
        if "/commit/" in path:
            for line in map(json.loads, body.splitlines()):
                value = line["value"]
                if line["key"] == "file":
                    repository["files"][value["path"]] = base64.b64decode(value["content"])
            return 200, {"commitUrl": f"{hub.url}/{name}/commit/{'0' * 40}", "commitOid": "0" * 40, "success": True}
        if "/tree/" in path:
            files = repository["files"].items()
            return 200, [{"type": "file", "path": file, "size": len(content), "oid": "0"} for file, content in files]
        info = {"id": name, "modelId": name, "sha": "0" * 40, "private": repository["private"], "siblings": []}
        return 200, info


@contextmanager
def serve() -> Iterator[Hub]:
    hub = Hub()
    thread = threading.Thread(target=hub.serve_forever, args=(0.01,), daemon=True)
    thread.start()
    try:
        yield hub
    finally:
        hub.shutdown()
        hub.server_close()
