"""
A hub on 127.0.0.1 that speaks what huggingface_hub asks for: files by revision, their list, refusals, a line that is
cut, and an upload. Some repositories answer as no hub should: see `mischief`.
"""
import base64
import hashlib
import json
import multiprocessing
import re
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from urllib.parse import unquote

COMMIT = "0123456789abcdef0123456789abcdef01234567"  # every repository is at this commit
CONVERTED = "refs-convert-parquet"  # a repository's subfolder with what is on refs/convert/parquet


@contextmanager
def serve(repos):
    """A server of repos, {name: folder}: .repos, to add to. .env has the environment variables that point a process at
    it; .requests the (method, repository, file, Range header) that it got for files; .cut {file: bytes after which the
    line is cut, the first time}; .uploaded {name: {file: bytes}}."""
    with ThreadingHTTPServer(("127.0.0.1", 0), Hub) as server:
        server.repos, server.requests, server.cut, server.uploaded = repos, [], {}, {}
        address = f"http://127.0.0.1:{server.server_port}"
        server.env = dict(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_ENDPOINT=address)
        threading.Thread(target=server.serve_forever, args=[0.01], daemon=True).start()
        try:
            yield server
        finally:
            server.shutdown()


def point_here(server, monkeypatch, cache):
    """This process and those that it starts take the server for their hub, with a cache of their own."""
    from huggingface_hub import constants

    for name, value in (server.env | {"HF_HOME": str(cache)}).items():
        monkeypatch.setenv(name, value)
    address = server.env["HF_ENDPOINT"]
    for name, value in dict(
        ENDPOINT=address, HUGGINGFACE_CO_URL_TEMPLATE=address + "/{repo_id}/resolve/{revision}/{filename}",
        HF_HUB_OFFLINE=False, HF_HUB_DISABLE_XET=True, HF_HUB_CACHE=str(cache),
    ).items():
        monkeypatch.setattr(constants, name, value)
    fork = multiprocessing.get_context("fork")  # so that workers have these changes
    monkeypatch.setattr(multiprocessing, "get_context", lambda method=None: fork)


class Hub(BaseHTTPRequestHandler):
    def do_GET(self):
        path = unquote(self.path.partition("?")[0]).replace("refs/convert/parquet", CONVERTED)
        repo, what, rest = re.fullmatch("/(?:api/)?(?:models/)?(.*?)(?:/(tree|revision|resolve)/(.*))?", path).groups()
        revision, _, name = (rest or "main").partition("/")
        if "org/bad_" in repo:
            self.mischief(repo.removeprefix("org/bad_"))
        elif what == "resolve":
            self.server.requests.append((self.command, repo, name, self.headers.get("Range")))
            self.send_file(self.folder(repo, revision), name)
        elif what == "tree":
            self.list_files(repo, revision)
        elif self.folder(repo, revision):
            self.send_json(dict(id=repo, sha=COMMIT, siblings=[]))

    do_HEAD = do_GET

    def allowed(self):
        return self.headers.get("Authorization") == "Bearer secret"

    def folder(self, repo, revision):
        """The folder of what is asked for; None if it is refused, and then the answer is sent."""
        folder = self.server.repos.get("org/tiny" if repo == "org/private" else repo)
        code, error = {"org/gated": (403, "GatedRepo"), "org/broken": (418, "")}.get(repo, (404, "RepoNotFound"))
        if repo == "org/private" and not self.allowed():
            code, error, folder = 401, "", None
        elif folder and revision not in ("main", "v2", COMMIT, CONVERTED):
            error, folder = "RevisionNotFound", None
        if folder is None:
            return self.send(code, X_Error_Code=error)
        return folder / CONVERTED if revision == CONVERTED else folder

    def list_files(self, repo, revision):
        folder = self.folder(repo, CONVERTED if revision == CONVERTED else "main")
        if folder:
            elsewhere = revision == "main" and folder / CONVERTED
            files = [path for path in folder.rglob("*") if path.is_file() and elsewhere not in path.parents]
            self.send_json([dict(type="file", path=str(path.relative_to(folder)), size=path.stat().st_size,
                                 oid="0" * 40) for path in files])

    def send_file(self, folder, name):
        if folder is None:
            return
        if not (folder / name).is_file():
            return self.send(404, X_Error_Code="EntryNotFound")
        content = (folder / name).read_bytes()
        headers = dict(ETag=f'"{hashlib.sha256(content).hexdigest()}"', X_Repo_Commit=COMMIT)
        begin = int(self.headers.get("Range", "bytes=0-").removeprefix("bytes=").split("-")[0])
        if begin:
            headers |= dict(Content_Range=f"bytes {begin}-{len(content) - 1}/{len(content)}")
        part = content[begin:]
        if self.command == "GET":
            part = part[: self.server.cut.pop(name, None)]
        self.send(206 if begin else 200, part, len(content) - begin, **headers)

    def mischief(self, kind):
        """Close the line, or cut it each time; what is no HTTP; a redirect to itself; more bytes or fewer than
        promised."""
        sent, promised = dict(long=(1000, 10**6), short=(1000, 10), cut=(500, 1000)).get(kind, (0, 0))
        if kind == "garbage":
            self.wfile.write(b"\0\xff no HTTP\r\n\r\n" * 10)
        elif kind == "loop":
            self.send(302, Location=self.path)
        elif kind != "close":
            self.send(200, b" " * sent, promised, ETag='"abc"', X_Repo_Commit=COMMIT)

    def do_POST(self):
        """Create a repository, say how each file is to come, take a commit of them: one answer to all three."""
        length = self.headers.get("Content-Length")
        body = self.rfile.read(int(length)) if length else b"".join(self.chunks())
        if not self.allowed():
            return self.send(401)
        lines = [json.loads(line) for line in body.splitlines()]
        repo = unquote(self.path).removeprefix("/api/models/").partition("/commit/")[0]
        files = [line["value"] for line in lines if line.get("key") == "file"]
        if files:
            self.server.uploaded[repo] = {file["path"]: base64.b64decode(file["content"]) for file in files}
        here = f"{self.server.env['HF_ENDPOINT']}/org/any"
        names = [file["path"] for file in lines[0].get("files", [])]
        modes = [dict(path=name, uploadMode="regular", shouldIgnore=False) for name in names]
        self.send_json(dict(url=here, files=modes, success=True, commitOid=COMMIT, commitUrl=f"{here}/commit/{COMMIT}"))

    def chunks(self):
        """A body that comes in chunks, each after a line with its size."""
        while size := int(self.rfile.readline(), 16):
            yield self.rfile.read(size)
            self.rfile.readline()
        self.rfile.readline()

    def send_json(self, content):
        self.send(200, json.dumps(content).encode(), Content_Type="application/json")

    def send(self, code, body=b"", length=None, **headers):
        """length: what is promised, if it is not that of the body."""
        self.send_response(code)
        for name, value in dict(Content_Length=len(body) if length is None else length, **headers).items():
            self.send_header(name.replace("_", "-"), str(value))
        self.end_headers()
        if self.command != "HEAD":
            self.wfile.write(body)

    def log_message(self, *args):
        pass
