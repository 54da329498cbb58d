"""A server of chat completions for tests, which does as it is told."""

import json
import socket
import threading
import time
from collections import Counter
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer


class Scripted(ThreadingHTTPServer):
    """`script(request, n)` answers the n-th request (from 0) with this last message: status and body.

    A body is text, a message or any other JSON; None drops the connection; a number is how many seconds to wait; bytes
    are sent as they are, packed with gzip, and what an iterator gives is sent bit by bit.
    """

    daemon_threads = True

    def __init__(self, script: Callable[[dict, int], tuple[int, object]]):
        super().__init__(("127.0.0.1", 0), _Handler)
        self.script, self.requests, self.times = script, [], []
        self.counts: Counter = Counter()
        self.busy = self.most_busy = 0
        self.lock = threading.Lock()

    def handle_error(self, request, client_address) -> None:
        """Clients that give up are part of the play."""


class _Handler(BaseHTTPRequestHandler):
    server: Scripted

    def do_POST(self) -> None:
        request = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        with self.server.lock:
            key = json.dumps(request["messages"][-1])
            n = self.server.counts[key]
            self.server.counts[key] += 1
            self.server.requests.append(request)
            self.server.times.append(time.monotonic())
            self.server.busy += 1
            self.server.most_busy = max(self.server.most_busy, self.server.busy)
        try:
            self._answer(*self.server.script(request, n))
        finally:
            with self.server.lock:
                self.server.busy -= 1

    def _answer(self, status: int, body: object) -> None:
        if body is None:
            self.connection.shutdown(socket.SHUT_RDWR)
            return
        if isinstance(body, float):
            time.sleep(body)
            body = "{}"
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        if isinstance(body, Iterator | bytes):
            if isinstance(body, bytes):
                self.send_header("Content-Encoding", "gzip")
            self.end_headers()
            for part in [body] if isinstance(body, bytes) else body:
                self.wfile.write(part)
            return
        text = body if isinstance(body, str) else json.dumps(body)
        if status >= 400:
            self.send_header("retry-after-ms", "1")
        self.send_header("Content-Length", str(len(text.encode())))
        self.end_headers()
        self.wfile.write(text.encode())

    def log_message(self, *_) -> None: ...


def says(content: str | None = None, **calls) -> tuple[int, dict]:
    """A completion in OpenAI's form."""
    message = {"role": "assistant", "content": content, **calls}
    choice = {"index": 0, "finish_reason": "stop", "message": message}
    return 200, {"id": "1", "object": "chat.completion", "created": 0, "model": "m", "choices": [choice]}


def calls(*functions: tuple[str, str]) -> tuple[int, dict]:
    """A completion that calls functions, by name and arguments."""
    listed = [
        {"id": f"call_{i}", "type": "function", "function": {"name": name, "arguments": arguments}}
        for i, (name, arguments) in enumerate(functions)
    ]
    return says(None, tool_calls=listed)
