"""An HTTP proxy that goes wrong as it is told to: what stores and networks do once a month, on demand.

Requests are passed on with their own Host header, so that their signatures stay right.
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
    """What came in. number: how many of this method and path came before."""

    method: str
    path: str
    number: int
    bytes: int


# What becomes of a request: passed on (None); answered with a status; the connection reset; passed on, and the answer
# lost ("lose"), cut in half ("short"), not continued after a half ("stall") or with its first bytes flipped ("flip");
# passed on twice, the second answer coming back ("double").
Fault = int | str | None


@dataclass
class Proxy:
    """Serves on loopback while it is entered. `rule` decides of each request; `seen` and `puts` keep them."""

    upstream: str
    rule: Callable[[Request], Fault] = lambda request: None
    after: Callable[[Request], None] = lambda request: None  # called when the upstream has answered
    seen: list[Request] = field(default_factory=list)
    puts: list[tuple[str, dict[str, str], bytes]] = field(default_factory=list)  # path, headers and body of each
    signed: set[str] = field(default_factory=set)  # the paths of requests with somebody's signature

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

    def note(self, method: str, path: str, length: int) -> Request:
        with self.lock:
            number = sum((request.method, request.path) == (method, path) for request in self.seen)
            self.seen.append(Request(method, path, number, length))
            return self.seen[-1]

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        proxy, host = self, urlsplit(self.upstream).netloc

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def pass_on(self) -> None:
                body = self.body()
                request = proxy.note(self.command, self.path, len(body))
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
                        self.connection.recv(1)  # until the other side gives it up
                        self.close_connection = True
                    elif fault == "flip":
                        self.answer(status, headers, bytes(byte ^ 0x55 for byte in data[:200]) + data[200:])
                    else:
                        self.answer(status, headers, data)

            do_GET = do_PUT = do_POST = do_HEAD = do_DELETE = pass_on  # noqa: N815

            def body(self) -> bytes:
                if self.headers.get("Expect", "").lower() == "100-continue":
                    pass  # answered by the base class already
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
                """Close the connection so that the other side sees ECONNRESET."""
                self.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 0))
                self.close_connection = True
                self.connection.close()

            def log_message(self, format: str, *args: object) -> None:
                pass

        return Handler
