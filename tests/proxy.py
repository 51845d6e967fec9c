"""An HTTP proxy that injects the faults of stores and networks on demand.

Requests are forwarded with their own Host header, so that their signatures stay valid.
"""

import http.client
import socket
import struct
import threading
from collections.abc import Callable
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from urllib.parse import urlsplit

CODES = {403: "AccessDenied", 429: "SlowDown", 500: "InternalError", 503: "SlowDown"}


@dataclass
class Request:
    """A request. number: how many requests with this method and path came before it."""

    method: str
    path: str
    number: int
    bytes: int


# The treatment of a request. None: forward it. A status: answer with that error. "reset": reset the connection.
# Forward it, but lose the response ("lose"), truncate it to half ("short"), stop after a half ("stall"), or flip its
# first bytes ("flip"). "double": forward it twice, and return the second response.
Fault = int | str | None


@dataclass
class Proxy:
    """A context manager that serves on loopback. `rule` chooses the fault of each request."""

    upstream: str
    rule: Callable[[Request], Fault] = lambda request: None
    after: Callable[[Request], None] = lambda request: None  # called after the upstream's response
    seen: list[Request] = field(default_factory=list)  # all requests so far
    puts: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)  # path, headers and body
    signed: set[str] = field(default_factory=set)  # paths of signed requests

    @property
    def url(self) -> str:
        return f"http://127.0.0.1:{self.server.server_port}"

    def __enter__(self) -> "Proxy":
        self.lock = threading.Lock()
        self.server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self.server.daemon_threads = True
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.server.shutdown()
        self.server.server_close()

    def record(self, method: str, path: str, length: int) -> Request:
        with self.lock:
            number = sum((request.method, request.path) == (method, path) for request in self.seen)
            self.seen.append(Request(method, path, number, length))
            return self.seen[-1]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy, host = self, urlsplit(self.upstream).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def handle_request(self) -> None:
                body = self.read_body()
                request = proxy.record(self.command, self.path, len(body))
                if "Authorization" in self.headers:
                    proxy.signed.add(self.path)
                if self.command == "PUT":
                    proxy.puts.append((self.path, dict(self.headers), body))
                fault = proxy.rule(request)
                if fault == "reset":
                    self.reset()
                elif isinstance(fault, int):
                    error = f"<Error><Code>{CODES[fault]}</Code><Message>No</Message></Error>".encode()
                    self.answer(fault, {"Content-Type": "application/xml"}, error)
                else:
                    status, headers, data = self.forward(body)
                    if fault == "double":
                        status, headers, data = self.forward(body)
                    proxy.after(request)
                    if fault == "lose":
                        self.reset()
                    elif fault == "short":
                        self.answer(status, headers, data, cut=len(data) // 2)
                        self.reset()
                    elif fault == "stall":
                        self.answer(status, headers, data, cut=len(data) // 2)
                        self.connection.recv(1)  # until the client gives up
                        self.close_connection = True
                    elif fault == "flip":
                        self.answer(status, headers, bytes(byte ^ 0x55 for byte in data[:200]) + data[200:])
                    else:
                        self.answer(status, headers, data)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = handle_request  # noqa: N815

            def read_body(self) -> bytes:
                if self.headers.get("Expect", "").lower() == "100-continue":
                    pass  # the base class has already answered
                if self.headers.get("Transfer-Encoding") == "chunked":
                    data = b""
                    while size := int(self.rfile.readline().split(b";")[0], 16):
                        data += self.rfile.read(size)
                        self.rfile.readline()
                    self.rfile.readline()
                    return data
                return self.rfile.read(int(self.headers.get("Content-Length") or 0))

            def forward(self, body: bytes) -> tuple[int, dict[str, str], bytes]:
                connection = http.client.HTTPConnection(host, timeout=30)
                headers = {k: v for k, v in self.headers.items() if k.lower() not in ("transfer-encoding", "expect")}
                connection.request(self.command, self.path, body, headers | {"Content-Length": str(len(body))})
                response = connection.getresponse()
                data = response.read()
                connection.close()
                return response.status, dict(response.getheaders()), data

            def answer(self, status: int, headers: dict[str, str], data: bytes, cut: int | None = None) -> None:
                self.send_response_only(status)
                for name, value in headers.items():
                    if name.lower() not in ("transfer-encoding", "connection", "content-length"):
                        self.send_header(name, value)
                length = headers.get("Content-Length") if self.command == "HEAD" else None
                self.send_header("Content-Length", length or str(len(data)))
                self.end_headers()
                if self.command != "HEAD":
                    self.wfile.write(data[:cut])
                self.wfile.flush()

            def reset(self) -> None:
                """Close the connection so that the client gets ECONNRESET."""
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler
