"""JSON over HTTP: many requests at once, each tried again where the server is busy, away or slow."""

from __future__ import annotations

import json
import math
import os
import random
import threading
from collections.abc import Callable, Mapping
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, TypeVar
from urllib.parse import urlsplit, urlunsplit

from asft_eval.backends import Done
from asft_eval.errors import EvaluationError

KEY_VARIABLE, URL_VARIABLE = "OPENAI_API_KEY", "OPENAI_BASE_URL"

SECONDS = 600.0
"""For one answer; a server that writes 4096 tokens for many at once takes minutes."""
_SECONDS_TO_CONNECT = 10.0
_TRIES = 8
_SLOW_TRIES = 2  # a request that took too long twice will again
_LONGEST_WAIT = 60.0

_Answer = TypeVar("_Answer")


class Server:
    """A server that speaks OpenAI's protocol. The key is read from the environment and never shown or written.

    Args:
        base_url: ends before `/models` and `/completions`; None = `OPENAI_BASE_URL`.
        at_once: requests under way.
        first_wait: seconds before the second try; doubled before each further one.

    Raises:
        EvaluationError: there is no address, it or a proxy's is malformed, or the key cannot be one.
    """

    def __init__(self, base_url: str | None, *, at_once: int, first_wait: float = 1.0):
        import httpx

        base_url = (base_url or os.environ.get(URL_VARIABLE) or "").strip()
        _require_address(base_url)
        self.url = _without_user(base_url)
        self._key = _key()
        self._httpx = httpx
        self._at_once, self._first_wait = at_once, first_wait
        self._given_up = threading.Event()
        try:
            self._client = httpx.Client(
                base_url=base_url,
                headers={"Authorization": f"Bearer {self._key}"} if self._key else {},
                timeout=httpx.Timeout(SECONDS, connect=_SECONDS_TO_CONNECT),
                limits=httpx.Limits(max_connections=at_once),
            )
        except (ValueError, ImportError, httpx.InvalidURL):  # what it says may hold a proxy's password
            raise EvaluationError(
                f"no connection to {self.url} can be set up: see that this address and those of proxies in the environment (HTTP_PROXY, HTTPS_PROXY, "
                "ALL_PROXY, NO_PROXY) are right; a SOCKS proxy also needs pip install socksio"
            ) from None

    def get(self, path: str, *, tries: int = _TRIES) -> dict[str, Any]:
        """The answer to a GET; see `post`."""
        return self._ask("GET", path, None, tries)

    def post(self, path: str, body: Mapping[str, Any], *, tries: int = _TRIES) -> dict[str, Any]:
        """The answer to a POST.

        Raises:
            EvaluationError: the server refuses the request, or did not answer it in so many tries.
        """
        return self._ask("POST", path, body, tries)

    def each(self, work: Callable[[int], _Answer], count: int, done: Done[_Answer]) -> list[_Answer]:
        """`work` of the numbers below `count`, several at once; `done` is told each answer in this thread.

        Where one fails, those under way are waited for and told too; the rest is not begun.
        """
        found: dict[int, _Answer] = {}
        with ThreadPoolExecutor(self._at_once) as pool:
            futures = {pool.submit(work, place): place for place in range(count)}

            def tell(future: Future[_Answer]) -> None:
                place = futures[future]
                found[place] = future.result()
                done(place, found[place])

            try:
                for future in as_completed(futures):
                    tell(future)
            except BaseException:
                self._given_up.set()
                pool.shutdown(cancel_futures=True)
                for future, place in futures.items():
                    if place not in found and not future.cancelled() and future.exception() is None:
                        tell(future)
                raise
            finally:
                self._given_up.clear()
        return [found[place] for place in range(count)]

    def _ask(self, method: str, path: str, body: Mapping[str, Any] | None, tries: int) -> dict[str, Any]:
        why, slow, number = "was not asked", 0, 0
        for number in range(tries):
            wait = min(self._first_wait * 2**number, _LONGEST_WAIT) * random.uniform(0.75, 1.0)
            try:
                response = self._client.request(method, path.lstrip("/"), json=body)
            except self._httpx.HTTPError as error:  # time-outs and unreadable content among them
                why = f"does not answer ({type(error).__name__}: {self.line(error)})"
                slow += isinstance(error, self._httpx.ReadTimeout)
            else:
                if response.status_code != 429 and response.status_code < 500:
                    return self._read(response)
                why = f"answers {response.status_code} ({self._words(response)})"
                wait = _asked_for(response.headers.get("retry-after"), wait)
            if slow == _SLOW_TRIES or (number + 1 < tries and self._given_up.wait(wait)):
                break
        raise EvaluationError(
            f"the server {self.url} {why}, tries: {number + 1}: see whether it runs and how busy it is (--batch-size is what we ask at once), and "
            "start again: answers so far are kept"
        )

    def _read(self, response: Any) -> dict[str, Any]:
        if response.status_code in (401, 403):
            raise EvaluationError(
                f"the server {self.url} refuses the key: put the right one into {KEY_VARIABLE} ({self._words(response)})"
            )
        try:
            content: Any = response.json()
        except ValueError:
            content = None
        found: dict[str, Any] = content if isinstance(content, dict) else {}  # pyright: ignore[reportUnknownVariableType]
        if response.status_code >= 300 or not isinstance(content, dict) or found.get("error"):
            raise EvaluationError(
                f"the server {self.url} cannot answer {response.request.url.path} (status {response.status_code}: {self._words(response)}): "
                "correct --base-url, the model's name or the settings"
            )
        return found

    def _words(self, response: Any) -> str:
        """What the server says of an error, in one line and without the key, which some repeat."""
        try:
            content = response.json()
            error = content.get("error", content)
            words = error if isinstance(error, str) else error.get("message") or error.get("detail")
        except (ValueError, AttributeError):
            words = response.text
        return self.line(words or "no reason given")

    def line(self, words: object) -> str:
        """One line without the key, which is hidden before anything is cut off: the start of a key is no word either."""
        return " ".join(without_key(str(words), self._key).split())[:300]


def without_key(text: str, key: str) -> str:
    """The text with stars for the key, also where quotes and backslashes in it were escaped, as repr and JSON do."""
    for form in sorted({key, repr(key)[1:-1], json.dumps(key)[1:-1]} - {""}, key=len, reverse=True):
        text = text.replace(form, "***")
    return text


def _key() -> str:
    """The key, "" for none. HTTP libraries show a header that they refuse, so what no header can carry is not given to them."""
    key = os.environ.get(KEY_VARIABLE, "").strip()
    if not (key.isascii() and key.isprintable()) or " " in key:
        raise EvaluationError(
            f"the key in {KEY_VARIABLE} holds a blank, a line break or a character beyond ASCII, which no key has: set it again "
            "(it is not shown here)"
        )
    return key


def _asked_for(header: str | None, otherwise: float) -> float:
    """Seconds that the server asks to wait (Retry-After as a number), at most a minute."""
    try:
        seconds = float(header or "")
    except ValueError:
        return otherwise
    return min(max(seconds, 0.0), _LONGEST_WAIT) if math.isfinite(seconds) else otherwise


def _require_address(url: str) -> None:
    """What the environment or a user gave is an address of a server, as far as can be seen without asking it.

    Raises:
        EvaluationError: it is none; the sentence shows it without user and password.
    """
    try:
        parts = urlsplit(url)
        _ = parts.port  # raises where it is none
        usable = parts.scheme in ("http", "https") and bool(parts.hostname) and url.isprintable()
    except ValueError:
        usable = False
    if not usable:
        raise EvaluationError(
            f"the server's address is {ascii(url.rpartition('@')[2])[1:-1] or 'not given'}: set --base-url or {URL_VARIABLE}, e.g. to "
            "http://127.0.0.1:8000/v1"
        )


def _without_user(url: str) -> str:
    parts = urlsplit(url)
    return urlunsplit((parts.scheme, parts.netloc.rpartition("@")[2], parts.path.rstrip("/"), "", ""))
