"""Stores in the cloud on loopback: emulators of gs:// and s3://, behind a proxy that can fail.

Both are reached as a real one is, by gcsfs and s3fs over HTTP.
"""

from __future__ import annotations

import contextlib
import http.client
import http.server
import threading
import time
from collections.abc import Iterator

import numpy as np


class FaultyProxy(http.server.ThreadingHTTPServer):
    """Passes requests on to a server, some of them after a wait, some not at all.

    Attributes:
      url: where it listens.
      failing: share of requests that are answered with 503 instead.
      stalling: share of requests that are not answered for `STALL` seconds.
      latency: seconds that an answer takes.
      fetched: bytes of shards that were sent.
      asked: requests for shards that were answered.
      failed: requests that were not.
      put: stores a file by its name and content without a request; of Google's only.
    """

    STALL = 30.0
    daemon_threads, request_queue_size = True, 128
    failing, stalling, latency = 0.0, 0.0, 0.0
    fetched = asked = failed = 0

    def __init__(self, server: tuple[str, int]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.server, self._rng, self._lock = server, np.random.default_rng(0), threading.Lock()
        self.url = f"http://127.0.0.1:{self.server_address[1]}"

    def draw(self) -> float:
        with self._lock:
            return self._rng.random()

    def count(self, bytes_sent: int) -> None:
        with self._lock:
            self.fetched += bytes_sent
            self.asked += 1

    def reset(self) -> None:
        """No more faults, and counts from 0."""
        self.failing = self.stalling = self.latency = 0.0
        self.fetched = self.asked = self.failed = 0

    def handle_error(self, request, client_address) -> None:
        """A client that hung up is none of the proxy's business."""


class _Handler(http.server.BaseHTTPRequestHandler):
    protocol_version, server = "HTTP/1.1", FaultyProxy

    def _pass_on(self) -> None:
        body = self._body()
        time.sleep(self.server.latency)
        if self.server.draw() < self.server.stalling:
            self.server.failed += 1
            time.sleep(FaultyProxy.STALL)
            self.close_connection = True
            return
        if self.server.draw() < self.server.failing:
            self.server.failed += 1
            self._answer(503, {}, b"try again later")
            return
        connection = http.client.HTTPConnection(*self.server.server, timeout=60)
        headers = {k: v for k, v in self.headers.items() if k.lower() != "transfer-encoding"}
        headers["Content-Length"] = str(len(body))
        connection.request(self.command, self.path, body, headers)
        answer = connection.getresponse()
        content = answer.read()
        connection.close()
        # A listing has what it looks for behind the question mark.
        if "array_record" in self.path.split("?")[0] and self.command == "GET":
            self.server.count(len(content))
        self._answer(answer.status, dict(answer.getheaders()), content)

    do_GET = do_PUT = do_POST = do_DELETE = do_HEAD = do_PATCH = _pass_on

    def _body(self) -> bytes:
        if self.headers.get("Transfer-Encoding", "").lower() != "chunked":
            return self.rfile.read(int(self.headers.get("Content-Length") or 0))
        parts = []
        while size := int(self.rfile.readline().split(b";")[0], 16):
            parts.append(self.rfile.read(size))
            self.rfile.readline()
        self.rfile.readline()
        return b"".join(parts)

    def _answer(self, status: int, headers: dict[str, str], content: bytes) -> None:
        self.send_response(status)
        for name, value in headers.items():
            if name.lower() not in ("transfer-encoding", "connection", "content-length", "date"):
                self.send_header(name, value)
        length = headers.get("Content-Length") if self.command == "HEAD" else None
        self.send_header("Content-Length", length or str(len(content)))
        self.end_headers()
        self.wfile.write(content)

    def log_message(self, *_) -> None:
        pass


@contextlib.contextmanager
def _proxied(server: tuple[str, int]) -> Iterator[FaultyProxy]:
    proxy = FaultyProxy(server)
    thread = threading.Thread(target=proxy.serve_forever, args=(0.05,), daemon=True)
    thread.start()
    try:
        yield proxy
    finally:
        proxy.shutdown()
        proxy.server_close()


@contextlib.contextmanager
def google_storage(bucket: str) -> Iterator[FaultyProxy]:
    """An emulator of Google Cloud Storage with an empty bucket, in memory."""
    from gcp_storage_emulator.server import create_server

    server = create_server("127.0.0.1", 0, in_memory=True, default_bucket=bucket)
    server.start()
    try:
        with _proxied(server._api._httpd.server_address[:2]) as proxy:

            def put(name: str, content: bytes) -> None:
                about = {"bucket": bucket, "name": name, "size": str(len(content))}
                # Not by create_file, which notes all files anew for each.
                server._storage._store.write_bytes(f"{bucket}/{name}", content)
                server._storage.objects.setdefault(bucket, {})[name] = about

            proxy.put = put
            yield proxy
    finally:
        server.stop()


@contextlib.contextmanager
def s3_storage(bucket: str) -> Iterator[FaultyProxy]:
    """An emulator of S3 with an empty bucket, in memory."""
    import boto3
    from moto.moto_server.threaded_moto_server import ThreadedMotoServer

    server = ThreadedMotoServer("127.0.0.1", 0, verbose=False)
    server.start()
    try:
        with _proxied(server.get_host_and_port()) as proxy:
            keys = {"aws_access_key_id": "any", "aws_secret_access_key": "any"}
            s3 = boto3.client("s3", region_name="us-east-1", endpoint_url=proxy.url, **keys)
            s3.create_bucket(Bucket=bucket)
            yield proxy
    finally:
        server.stop()
