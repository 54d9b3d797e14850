"""A stand-in for the Hugging Face hub: the few answers that downloads of one data set ask for, by a local server."""

import hashlib
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import parse_qs, unquote, urlsplit

REPOSITORY = "owner/name"
REVISION = "a" * 40


@contextmanager
def hub_of(files: dict[str, bytes]) -> Iterator[str]:
    """The address of a server whose one data set, REPOSITORY, holds `files`; set HF_ENDPOINT to it."""
    handler = type("Handler", (_Handler,), {"files": files})
    server = ThreadingHTTPServer(("127.0.0.1", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield f"http://127.0.0.1:{server.server_port}"
    finally:
        server.shutdown()
        server.server_close()


class _Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"
    files: dict[str, bytes] = {}

    def do_GET(self) -> None:
        path = unquote(urlsplit(self.path).path)
        api, resolve = f"/api/datasets/{REPOSITORY}", f"/datasets/{REPOSITORY}/resolve/"
        if path.startswith(f"{api}/tree/"):
            self._say_json(self._listing("/".join(path.removeprefix(f"{api}/tree/").split("/")[1:])))
        elif path == api or path.startswith(f"{api}/revision/"):
            siblings = [{"rfilename": name} for name in self.files]
            facts = {"id": REPOSITORY, "sha": REVISION, "private": False, "gated": False, "disabled": False}
            self._say_json({**facts, "tags": [], "downloads": 0, "likes": 0, "siblings": siblings})
        elif path.startswith(resolve) and (name := path.removeprefix(resolve).split("/", 1)[1]) in self.files:
            self._say(self.files[name], ETag=f'"{hashlib.sha1(self.files[name]).hexdigest()}"')
        else:
            error = "EntryNotFound" if path.startswith((api, resolve)) else "RepoNotFound"
            self._say(b"", 404, **{"X-Error-Code": error})

    do_HEAD = do_GET

    def do_POST(self) -> None:
        body = self.rfile.read(int(self.headers.get("Content-Length", 0)))
        is_json = "json" in self.headers.get("Content-Type", "")
        asked = json.loads(body)["paths"] if is_json else parse_qs(body.decode()).get("paths", [])
        self._say_json([self._file(name) for name in self.files if name in asked])

    def _listing(self, folder: str) -> list[dict]:
        under = f"{folder}/" if folder else ""
        inside = {name: name.removeprefix(under) for name in self.files if name.startswith(under)}
        folders = sorted({under + rest.split("/")[0] for rest in inside.values() if "/" in rest})
        found = [self._file(name) for name, rest in inside.items() if "/" not in rest]
        return found + [{"type": "directory", "path": path, "size": 0, "oid": "0" * 40} for path in folders]

    def _file(self, name: str) -> dict:
        data = self.files[name]
        return {"type": "file", "path": name, "size": len(data), "oid": hashlib.sha1(data).hexdigest()}

    def _say_json(self, value: object) -> None:
        self._say(json.dumps(value).encode(), **{"Content-Type": "application/json"})

    def _say(self, body: bytes, status: int = 200, **headers: str) -> None:
        self.send_response(status)
        for key, value in {**headers, "Content-Length": str(len(body)), "X-Repo-Commit": REVISION}.items():
            self.send_header(key, value)
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *arguments: object) -> None:
        pass
