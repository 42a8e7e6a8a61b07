"""An HTTP server on loopback that answers as a script says: well, badly, late, or not at all."""

from __future__ import annotations

import contextlib
import json
import threading
import time
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

Script = Callable[["Asked"], Any]


class Asked:
    """One request as the server saw it."""

    def __init__(self, path: str, headers: dict[str, str], body: dict[str, Any], number: int, when: float):
        self.path, self.headers, self.body, self.number, self.when = path, headers, body, number, when

    @property
    def text(self) -> str:
        """All that the request says, in one text."""
        return self.body.get("prompt") or "\n".join(message["content"] for message in self.body["messages"])


class Answer:
    """Status, headers and raw bytes; `Hang`, `Drop` and `Drip` for what no bytes can say."""

    def __init__(self, status: int = 200, body: Any = b"", headers: dict[str, str] | None = None):
        self.status, self.headers = status, headers or {}
        self.body = body if isinstance(body, bytes) else json.dumps(body).encode()


class Hang(Answer):
    """No answer for so many seconds."""

    def __init__(self, seconds: float):
        super().__init__(200, {})
        self.seconds = seconds


class Drop(Answer):
    """Half of the body, then the connection is closed."""


class Drip(Answer):
    """The body in small pieces, with a pause after each."""

    def __init__(self, body: Any, pause: float):
        super().__init__(200, body)
        self.pause = pause


def chat(text: str | None, finish: str = "stop", usage: Any = (100, 20)) -> Answer:
    """A good chat completion with `text`."""
    choice = {"index": 0, "message": {"role": "assistant", "content": text}, "finish_reason": finish}
    body = {"id": "x", "object": "chat.completion", "choices": [choice]}
    if usage is not None:
        body["usage"] = {"prompt_tokens": usage[0], "completion_tokens": usage[1], "total_tokens": sum(usage)}
    return Answer(200, body)


def error(status: int, message: str = "no", headers: dict[str, str] | None = None) -> Answer:
    """An error as OpenAI words it."""
    return Answer(status, {"error": {"message": message, "type": "error"}}, headers)


class ScriptedServer:
    """What the tests see of it: `url`, every request in `asked`, and how many were open at once."""

    def __init__(self, url: str):
        self.url = url
        self.asked: list[Asked] = []
        self.open = self.most_open = 0
        self.guard = threading.Lock()


@contextlib.contextmanager
def scripted_server(script: Script) -> Iterator[ScriptedServer]:
    """Serves until the end of the block; `script` makes an `Answer` of each request, in a thread of its own."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"
        disable_nagle_algorithm = True  # or each answer waits 40 ms for an acknowledgement

        def do_POST(self) -> None:
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            with server.guard:
                server.open += 1
                server.most_open = max(server.most_open, server.open)
                headers = {name.lower(): value for name, value in self.headers.items()}
                asked = Asked(self.path, headers, body, len(server.asked), time.monotonic())
                server.asked.append(asked)
            try:
                self._send(script(asked))
            except (BrokenPipeError, ConnectionResetError):
                self.close_connection = True
            finally:
                with server.guard:
                    server.open -= 1

        def _send(self, answer: Answer) -> None:
            if isinstance(answer, Hang):
                stopping.wait(answer.seconds)
                self.close_connection = True
                return
            self.send_response(answer.status)
            for name, value in {"Content-Type": "application/json", **answer.headers}.items():
                self.send_header(name, value)
            self.send_header("Content-Length", str(len(answer.body)))
            self.end_headers()
            if isinstance(answer, Drop):
                self.wfile.write(answer.body[: len(answer.body) // 2])
                self.close_connection = True
            elif isinstance(answer, Drip):
                for start in range(0, len(answer.body), 8):
                    self.wfile.write(answer.body[start : start + 8])
                    self.wfile.flush()
                    if stopping.wait(answer.pause):
                        break
            else:
                self.wfile.write(answer.body)

        def log_message(self, *args: object) -> None:
            pass

    class HTTPServer(ThreadingHTTPServer):
        daemon_threads = True
        request_queue_size = 128

        def handle_error(self, request: Any, client_address: Any) -> None:
            pass  # clients that go away in the middle are what the tests are about

    stopping = threading.Event()
    http = HTTPServer(("127.0.0.1", 0), Handler)
    server = ScriptedServer(f"http://127.0.0.1:{http.server_address[1]}/v1")
    thread = threading.Thread(target=http.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True)
    thread.start()
    try:
        yield server
    finally:
        stopping.set()
        http.shutdown()
        http.server_close()
