"""
A hub on 127.0.0.1 that speaks what huggingface_hub asks for: files by revision, their list, refusals, a line
that is cut, and an upload.
"""
import base64
import hashlib
import json
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # of whatever it holds
CONVERTED = "refs-convert-parquet"  # a repository's subfolder with what is on refs/convert/parquet


@contextmanager
def serve(repos):
    """A server of repos, {name: folder}. It has

    .env       environment variables that point a process at it
    .repos     the same dict, to add to
    .requests  [(method, repository, file, Range header)] that it got for files
    .cut       {file: bytes after which the line is cut, the first time}
    .uploaded  {name: {file: bytes}}
    """
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hub)
    server.repos = repos
    server.requests = []
    server.cut = {}
    server.uploaded = {}
    server.env = {
        "HF_HUB_OFFLINE": "0",
        "HF_HUB_DISABLE_XET": "1",
        "HF_ENDPOINT": f"http://127.0.0.1:{server.server_port}",
    }
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()


class Hub(BaseHTTPRequestHandler):
    def do_HEAD(self):
        self.answer(with_body=False)

    def do_GET(self):
        self.answer(with_body=True)

    def answer(self, with_body):
        path = unquote(self.path.partition("?")[0]).lstrip("/").replace("refs/convert/parquet", CONVERTED)
        if path.startswith("api/") and "/tree/" in path:
            repo, revision = path.removeprefix("api/").removeprefix("models/").split("/tree/")
            self.list_files(repo, revision)
        elif path.startswith("api/models/"):
            repo, _, revision = path.removeprefix("api/models/").partition("/revision/")
            if not self.refused(repo, revision):
                self.send_json(dict(id=repo, sha=COMMIT, siblings=[]))
        else:
            repo, _, rest = path.partition("/resolve/")
            revision, _, name = rest.partition("/")
            self.server.requests.append((self.command, repo, name, self.headers.get("Range")))
            self.send_file(repo, revision, name, with_body)

    def list_files(self, repo, revision):
        if self.refused(repo, "main"):
            return
        folder = self.server.repos["org/tiny" if repo == "org/private" else repo]
        if revision == CONVERTED:
            folder = folder / CONVERTED
        found = []
        for path in folder.rglob("*"):
            elsewhere = revision == "main" and CONVERTED in path.parts
            if path.is_file() and not elsewhere:
                name = str(path.relative_to(folder))
                found.append(dict(type="file", path=name, size=path.stat().st_size, oid="0" * 40))
        self.send_json(found)

    def refused(self, repo, revision):
        """Whether it is, and then the answer is sent."""
        known = repo in self.server.repos or repo == "org/private"
        answer = None
        if repo == "org/private" and self.headers.get("Authorization") != "Bearer secret":
            answer = 401, None
        elif repo == "org/gated":
            answer = 403, "GatedRepo"
        elif repo == "org/broken":
            answer = 418, None
        elif not known:
            answer = 404, "RepoNotFound"
        elif revision not in ("main", "v2", COMMIT, CONVERTED):
            answer = 404, "RevisionNotFound"
        if answer:
            self.refuse(*answer)
        return answer is not None

    def send_file(self, repo, revision, name, with_body):
        if self.refused(repo, revision):
            return
        folder = self.server.repos["org/tiny" if repo == "org/private" else repo]
        if revision == CONVERTED:
            folder = folder / CONVERTED
        if not (folder / name).is_file():
            return self.refuse(404, "EntryNotFound")

        content = (folder / name).read_bytes()
        begin = 0
        if self.headers.get("Range"):
            begin = int(self.headers["Range"].removeprefix("bytes=").split("-")[0])
        self.send_response(206 if begin else 200)
        self.send_header("ETag", f'"{hashlib.sha256(content).hexdigest()}"')
        self.send_header("X-Repo-Commit", COMMIT)
        self.send_header("Content-Length", str(len(content) - begin))
        if begin:
            self.send_header("Content-Range", f"bytes {begin}-{len(content) - 1}/{len(content)}")
        self.end_headers()
        if not with_body:
            return
        if name in self.server.cut:
            end = begin + self.server.cut.pop(name)
            self.wfile.write(content[begin:end])
            self.wfile.flush()
            self.connection.close()
        else:
            self.wfile.write(content[begin:])

    def do_POST(self):
        """Uploads: create a repository, say how each file is to come, take a commit of them."""
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else self.read_chunks()
        if self.headers.get("Authorization") != "Bearer secret":
            return self.refuse(401)
        endpoint = self.server.env["HF_ENDPOINT"]
        path = unquote(self.path)
        reply = {}
        if path == "/api/repos/create":
            wanted = json.loads(body)
            reply = dict(url=f"{endpoint}/{wanted.get('organization', 'org')}/{wanted['name']}")
        elif "/preupload/" in path:
            files = []
            for file in json.loads(body)["files"]:
                files.append(dict(path=file["path"], uploadMode="regular", shouldIgnore=False))
            reply = dict(files=files)
        elif "/commit/" in path:
            repo = path.removeprefix("/api/models/").partition("/commit/")[0]
            files = {}
            for line in map(json.loads, body.splitlines()):
                if line["key"] == "file":
                    files[line["value"]["path"]] = base64.b64decode(line["value"]["content"])
            self.server.uploaded[repo] = files
            reply = dict(success=True, commitOid=COMMIT, commitUrl=f"{endpoint}/{repo}/commit/{COMMIT}")
        self.send_json(reply)

    def read_chunks(self):
        """A body that comes in chunks, each after a line with its size."""
        body = b""
        while True:
            size = int(self.rfile.readline(), 16)
            body += self.rfile.read(size)
            self.rfile.readline()
            if size == 0:
                return body

    def send_json(self, content):
        body = json.dumps(content).encode()
        self.send_response(200)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)

    def refuse(self, code, error=None):
        self.send_response(code)
        if error:
            self.send_header("X-Error-Code", error)
        self.send_header("Content-Length", "0")
        self.end_headers()

    def log_message(self, *args):
        pass
