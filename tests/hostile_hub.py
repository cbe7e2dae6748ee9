"""
A server on 127.0.0.1 that a hub's client should not trust. What it does is the second part of a repository's name:
org/close, org/garbage, org/loop, org/long, org/short, org/cut, org/nonsense, org/busy, org/stall.
"""
import threading
import time
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

COMMIT = "0123456789abcdef0123456789abcdef01234567"
CONTENT = b"{}" * 500


@contextmanager
def serve():
    """Gives the environment variables that point a process at it."""
    server = ThreadingHTTPServer(("127.0.0.1", 0), Hostile)
    server.daemon_threads = True
    threading.Thread(target=server.serve_forever, daemon=True).start()
    try:
        yield dict(HF_HUB_OFFLINE="0", HF_HUB_DISABLE_XET="1", HF_ENDPOINT=f"http://127.0.0.1:{server.server_port}")
    finally:
        server.shutdown()
        server.server_close()


class Hostile(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_HEAD(self):
        self.answer(False)

    def do_GET(self):
        self.answer(True)

    def answer(self, with_body):
        parts = self.path.split("/")
        kind = parts[parts.index("org") + 1] if "org" in parts else "close"
        self.close_connection = True
        if kind == "close":
            return
        if kind == "stall":
            time.sleep(1000)
        if kind == "garbage":
            self.wfile.write(b"\0\xff no HTTP\r\n\r\n" * 10)
            return
        if kind == "loop":
            return self.send(302, b"", with_body, Location=self.path)
        if kind == "busy":
            return self.send(429, b"", with_body)
        sizes = dict(long=10**6, short=10, cut=len(CONTENT))
        content = CONTENT[:500] if kind == "cut" else CONTENT
        self.send(200, content, with_body, sizes.get(kind), ETag='"abc"', **{"X-Repo-Commit": COMMIT})

    def send(self, code, content, with_body, size=None, **headers):
        self.send_response(code)
        for name, value in headers.items():
            self.send_header(name, value)
        self.send_header("Content-Length", str(len(content) if size is None else size))
        self.end_headers()
        if with_body:
            self.wfile.write(content)

    def log_message(self, *args):
        pass
