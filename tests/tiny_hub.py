"""A hub on 127.0.0.1 that speaks what huggingface_hub asks for: files by revision, their list, refusals, a cut line, and an upload."""
import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"


class Hub(BaseHTTPRequestHandler):
    def answer(self, body):
        server = self.server
        path = unquote(self.path.partition("?")[0]).lstrip("/").replace("refs/convert/parquet", "refs-convert-parquet")
        if path.startswith("api/") and "/tree/" in path:
            return self.list_files(*path.removeprefix("api/").split("/tree/"))
        repo, _, rest = path.partition("/resolve/")
        revision, _, name = rest.partition("/")
        server.requests.append((self.command, repo, name, self.headers.get("Range")))
        if repo == "org/private" and self.headers.get("Authorization") != "Bearer secret":
            return self.refuse(401, None)
        if repo == "org/gated":
            return self.refuse(403, "GatedRepo")
        if repo == "org/broken":
            return self.refuse(418, None)
        folder = server.repos.get("org/tiny" if repo == "org/private" else repo)
        if folder is None:
            return self.refuse(404, "RepoNotFound")
        if revision == "refs-convert-parquet":
            folder = folder / revision
        elif revision not in ("main", "v2", COMMIT):
            return self.refuse(404, "RevisionNotFound")
        if not (folder / name).is_file():
            return self.refuse(404, "EntryNotFound")
        content = (folder / name).read_bytes()
        start = int(self.headers["Range"].removeprefix("bytes=").split("-")[0]) if self.headers.get("Range") else 0
        self.send_response(206 if start else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - start))
        if start:
            self.send_header("Content-Range", f"bytes {start}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if body:
            cut = server.cut.pop(name, None)  # the first time, only so many bytes
            self.wfile.write(content[start : start + cut if cut else None])
            if cut:
                self.wfile.flush()
                self.connection.close()

    def list_files(self, repo, revision):
        folder = self.server.repos.get(repo)
        if folder is None:
            return self.refuse(404, "RepoNotFound")
        folder = folder / revision if revision == "refs-convert-parquet" else folder
        found = [dict(type="file", path=str(p.relative_to(folder)), size=p.stat().st_size, oid="0" * 40) for p in folder.rglob("*")
                 if p.is_file() and (revision != "main" or "refs-convert-parquet" not in p.parts)]
        body = json.dumps(found).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def do_POST(self):
        """Uploads: create a repository, say how each file is to come, take a commit of them."""
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self.read_chunks()
        if self.headers.get("Authorization") != "Bearer secret":
            return self.refuse(401, None)
        path = unquote(self.path)
        if path == "/api/repos/create":
            name = json.loads(body)
            reply = dict(url=f"{self.server.env['HF_ENDPOINT']}/{name.get('organization', 'org')}/{name['name']}")
        elif "/preupload/" in path:
            reply = dict(files=[dict(path=f["path"], uploadMode="regular", shouldIgnore=False) for f in json.loads(body)["files"]])
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            values = [line["value"] for line in map(json.loads, body.splitlines()) if line["key"] == "file"]
            self.server.uploaded[repo] = {v["path"]: base64.b64decode(v["content"]) for v in values}
            reply = dict(success=True, commitOid=COMMIT, commitUrl=f"{self.server.env['HF_ENDPOINT']}/{repo}/commit/{COMMIT}")
        else:
            reply = {}
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(reply := json.dumps(reply).encode())))
        self.end_headers()
        self.wfile.write(reply)

    def read_chunks(self):
        body = b""
        while size := int(self.rfile.readline(), 16):
            body += self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()
        return body

    def refuse(self, code, error):
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def do_HEAD(self):
        self.answer(body=False)

    def do_GET(self):
        self.answer(body=True)

    def log_message(self, *args):
        pass


@contextmanager
def serve(repos):
    """A server with .env to point a process at it, .requests it got, .repos {name: folder}, .cut {file: bytes until it breaks off} and .uploaded {name: {file: bytes}}."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.requests, server.cut, server.repos, server.uploaded = [], {}, repos, {}
    server.env = {"HF_HUB_OFFLINE": "0", "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}", "HF_HUB_DISABLE_XET": "1"}
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
