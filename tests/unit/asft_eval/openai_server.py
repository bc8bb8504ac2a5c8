"""A small server that speaks OpenAI's protocol for tests: its model turns lower into upper case, a character a token."""

from __future__ import annotations

import json
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

MODEL = "upper"
LOGPROB = -0.5


class FakeServer(ThreadingHTTPServer):
    """What it is asked is in `asked` (path and body) and `keys`; what it answers first is in `failures`.

    Attributes:
        failures: status and headers of the next answers, None for a connection that is cut; then it answers properly.
        dead_after: proper answers after which it is down for good.
        models: their names.
        seconds: before an answer.
        owner: who runs it, as `/models` says.
        logprobs: whether it gives log probabilities of a given text.
        width: characters of a token.
        instead: what is sent in place of a proper answer, made of path and that; bytes go out as they are.
    """

    daemon_threads = True

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Handler)
        self.asked: list[tuple[str, dict[str, Any]]] = []
        self.keys: set[str | None] = set()
        self.failures: list[tuple[int, dict[str, str]] | None] = []
        self.dead_after: int | None = None
        self.models, self.seconds = [MODEL], 0.0
        self.owner, self.logprobs, self.width = "someone", True, 1
        self.instead: Callable[[str, dict[str, Any]], Any] = lambda path, proper: proper
        self.lock = threading.Lock()

    @property
    def url(self) -> str:
        """As --base-url takes it."""
        return f"http://127.0.0.1:{self.server_port}/v1"

    def handle_error(self, request: Any, client_address: Any) -> None:
        """Cut connections are what some tests are about."""


class _Handler(BaseHTTPRequestHandler):
    server: FakeServer
    protocol_version = "HTTP/1.1"

    def log_message(self, format: str, *args: Any) -> None:
        """Says nothing."""

    def do_GET(self) -> None:
        proper = {"data": [{"id": x, "owned_by": self.server.owner} for x in self.server.models]}
        self._answer(200, self.server.instead("models", proper))

    def do_POST(self) -> None:
        body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
        server = self.server
        with server.lock:
            server.keys.add(self.headers.get("Authorization"))
            server.asked.append((self.path.removeprefix("/v1/"), body))
            failure: Any = server.failures.pop(0) if server.failures else ()
            if server.dead_after is not None:
                failure = (503, {}) if server.dead_after <= 0 else failure
                server.dead_after -= 1
        time.sleep(server.seconds)
        if failure is None:
            self.close_connection = True
        elif failure:
            words = f"it does not work with {self.headers.get('Authorization')}"
            self._answer(failure[0], {"error": {"message": words}}, failure[1])
        else:
            self._answer(200, self.server.instead(self.path.removeprefix("/v1/"), self._proper(body)))

    def _proper(self, body: dict[str, Any]) -> dict[str, Any]:
        chat = "messages" in body
        prompt = body["messages"][0]["content"] if chat else body["prompt"]
        tokens = self._tokens(prompt)
        text = "".join(tokens).upper()[: body["max_tokens"]]
        choice: dict[str, Any] = {"finish_reason": "length" if len(text) < len("".join(tokens)) else "stop"}
        choice |= {"message": {"content": text}} if chat else {"text": text, "logprobs": None}
        if body.get("echo") and self.server.logprobs:
            values = [LOGPROB if token.isupper() else 2 * LOGPROB for token in tokens]
            choice["logprobs"] = {
                "tokens": [*tokens, "!"],
                "token_logprobs": [None, *values[1:], LOGPROB],
            }
        usage = {"prompt_tokens": len(tokens), "completion_tokens": len(text)}
        return {"choices": [choice], "usage": usage}

    def _tokens(self, prompt: str | list[int]) -> list[str]:
        if isinstance(prompt, list):
            return [chr(x) for x in prompt]
        return [prompt[i : i + self.server.width] for i in range(0, len(prompt), self.server.width)]

    def _answer(self, status: int, content: Any, headers: dict[str, str] | None = None) -> None:
        raw = content if isinstance(content, bytes) else json.dumps(content).encode()
        self.send_response(status)
        for name, value in {"Content-Length": str(len(raw)), **(headers or {})}.items():
            self.send_header(name, value)
        self.end_headers()
        self.wfile.write(raw)


@contextmanager
def serving(change: Callable[[FakeServer], None] = lambda server: None) -> Iterator[FakeServer]:
    """A server on a free port until the block ends."""
    server = FakeServer()
    change(server)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02})
    thread.start()
    try:
        yield server
    finally:
        server.shutdown()
        server.server_close()
        thread.join()
