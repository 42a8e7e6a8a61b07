"""Requests to an OpenAI-compatible server. Several threads may share a `Server`.

The `openai` client retries a request after 408, 409, 429, 5xx, timeouts and lost connections. It waits longer each
time, with random jitter, and respects `Retry-After` (up to two minutes).
"""

from __future__ import annotations

import dataclasses
import json
import os
import re
import time
from typing import Any

from tuna_peft.errors import UserError
from tuna_peft.feedback.settings import ServerSettings
from tuna_peft.feedback.spending import Spending, Usage, estimate_tokens

MAX_ANSWER_BYTES = 16 << 20
"""A longer answer is an error. The log-probabilities of a long prompt need some megabytes."""


MIN_SECRET = 8
"""A shorter key is none: local servers take `EMPTY` or `x`, which must not be replaced in answers."""


class RequestFailed(UserError):
    """This request has no usable answer; other requests may have one."""


class NoAnswer(RequestFailed):
    """No answer after all retries: overload, timeout or lost connection. A later run may get one."""


class Refused(RequestFailed):
    """The server rejects this request (400, 413, 422); a retry would not help."""


class BadAnswer(RequestFailed):
    """The answer cannot be read. Another attempt may give a different answer."""


@dataclasses.dataclass(frozen=True)
class Reply:
    """A server's answer.

    Args:
        data: The JSON object. Its content is not checked yet.
        usage: As the server reports it, or an estimate.
    """

    data: dict[str, Any]
    usage: Usage


class Server:
    """A client for one model on one server.

    Args:
        settings: See `ServerSettings`. The API key is read from the environment here. It is only used in the headers
            of requests, and removed from answers and error messages.
        spending: Counts tokens and enforces the limit; by default a new counter with the settings' prices.

    Raises:
        UserError: The `openai` package is missing, or the key contains characters that no key can have.
    """

    def __init__(self, settings: ServerSettings, spending: Spending | None = None):
        try:
            import httpx2
            import openai
        except ImportError:
            raise UserError("servers need the `openai` package", fix="Install it: pip install openai") from None
        self.settings, self._where = settings, settings.base_url
        self.spending = spending or Spending(settings)
        self._key = os.environ.get(settings.api_key_env, "").strip()
        if not re.fullmatch(r"[!-~]*", self._key):
            raise UserError("the API key contains spaces or unprintable characters", where=settings.api_key_env)
        self._openai, self._response = openai, httpx2.Response
        self._client = openai.OpenAI(
            base_url=settings.base_url,
            api_key=self._key or "none",  # local servers need no key, but the client requires one
            max_retries=settings.max_retries,
            timeout=settings.timeout,
            http_client=_limited_client(settings),
        )

    def chat(self, messages: list[dict[str, str]], **options: Any) -> Reply:
        """POST chat/completions. `options` are further fields of the request; for errors see `post`."""
        return self.post("/chat/completions", {"messages": messages, **options})

    def complete(self, prompt: str | list[int], **options: Any) -> Reply:
        """POST completions: `prompt` is text or token ids; for errors see `post`."""
        return self.post("/completions", {"prompt": prompt, **options})

    def post(self, path: str, body: dict[str, Any]) -> Reply:
        """Sends one request, with the retries that the settings allow.

        Args:
            path: Path below the base URL.
            body: The request without `model`. Its `max_tokens` (times `n`) is the upper bound of its cost.

        Raises:
            NoAnswer, Refused, BadAnswer: This request failed.
            CostLimitReached: The request could exceed the limit of the cost; it was not sent.
            UserError: No request can succeed: wrong key, or no such model or path.
        """
        worst = Usage(1, _tokens_of(body), body.get("n", 1) * (body.get("max_tokens") or 0))
        with self.spending.request(worst) as used:
            content = self._send(path, {"model": self.settings.model, **body})
            used.append(worst)  # an answer that cannot be read costs money, too
            data = self._redacted(self._parse(content))
            used[0] = usage = _usage(data, worst)
        return Reply(data, usage)

    def _send(self, path: str, body: dict[str, Any]) -> bytes:
        try:
            return self._client.post(path, body=body, cast_to=self._response).content
        except UnicodeEncodeError:
            raise Refused("the text contains half of a surrogate pair", where=self._where) from None
        except self._openai.APIStatusError as error:
            raise self._fault_of_status(error.status_code, self._message(error)) from None
        except self._openai.APITimeoutError:
            what = f"no answer within {self.settings.timeout:g} s in up to {self.settings.max_retries + 1} attempts"
            fix = "Allow a longer timeout, or fewer concurrent requests."
            raise NoAnswer(what, where=self._where, fix=fix) from None
        except self._openai.APIConnectionError as error:
            reason = self.scrub(str(error.__cause__ or error))
            what = f"no connection in {self.settings.max_retries + 1} attempts: {reason}"
            fix = "Check that the server is running and that the address is right."
            raise NoAnswer(what, where=self._where, fix=fix) from None
        except self._openai.OpenAIError as error:
            raise BadAnswer(self.scrub(str(error)), where=self._where) from None

    def _fault_of_status(self, status: int, message: str) -> UserError:
        name = self.settings.api_key_env
        if status in (401, 403):
            reason = f"rejects the API key in {name}" if self._key else f"requires an API key, and {name} is not set"
            what = f"the server {reason} ({status}: {message})"
            return UserError(what, where=self._where, fix=f"Set {name} to a valid key.")
        if status == 402:
            return UserError(f"the account has no credit left ({message})", where=self._where)
        if status in (404, 405):
            fix = f"Check the base URL and the model's name, {self.settings.model!r}."
            return UserError(f"no such path or model ({status}: {message})", where=self._where, fix=fix)
        if status in (408, 409, 429) or status >= 500:
            what = f"{status} after up to {self.settings.max_retries + 1} attempts: {message}"
            return NoAnswer(what, where=self._where)
        return Refused(f"the server rejects the request ({status}: {message})", where=self._where)

    def _message(self, error: Any) -> str:
        body = error.body
        if isinstance(body, dict):
            body = body.get("message", body)
        return self.scrub(str(body if body else error.message))

    def scrub(self, text: str, most: int = 300) -> str:
        """A server's text made safe for a terminal or a log: without the API key, on one line, shortened."""
        if self._key:
            text = text.replace(self._key, "[key]")
        text = re.sub(r"[\x00-\x1f\x7f-\x9f\s]+", " ", text).strip()
        return text if len(text) <= most else text[:most] + " ..."

    def _redacted(self, data: dict[str, Any]) -> dict[str, Any]:
        """An answer without the API key, which a careless or hostile server may repeat: answers are stored."""
        if len(self._key) < MIN_SECRET:
            return data
        try:
            return _replaced(data, self._key, "[key]")
        except RecursionError:
            raise BadAnswer("the answer is nested too deeply", where=self._where) from None

    def _parse(self, content: bytes) -> dict[str, Any]:
        try:
            data = json.loads(content.decode("utf-8"))
        except (ValueError, RecursionError):
            raise BadAnswer(f"the answer is not JSON: {self.scrub(repr(content[:80]))}", where=self._where) from None
        if not isinstance(data, dict):
            raise BadAnswer("the answer is JSON, but not an object", where=self._where)
        return data


def _replaced(value: Any, old: str, new: str) -> Any:
    """The JSON value with `old` replaced in every text and key."""
    if isinstance(value, str):
        return value.replace(old, new)
    if isinstance(value, list):
        return [_replaced(entry, old, new) for entry in value]
    if isinstance(value, dict):
        return {key.replace(old, new): _replaced(entry, old, new) for key, entry in value.items()}
    return value


def _limited_client(settings: ServerSettings) -> Any:
    """An HTTP client that stops reading an answer that is too long or takes too long."""
    import httpx2
    import openai

    class LimitedClient(openai.DefaultHttpxClient):
        def send(self, request: Any, *, stream: bool = False, **options: Any) -> Any:
            began = time.monotonic()
            response = super().send(request, stream=True, **options)
            body = bytearray()
            try:
                for chunk in response.iter_bytes():
                    body += chunk
                    if len(body) > MAX_ANSWER_BYTES:
                        # The client does not retry after an error of this class.
                        raise openai.OpenAIError(f"the answer is longer than {MAX_ANSWER_BYTES >> 20} MiB")
                    # The socket's own timeout starts anew with every chunk.
                    if time.monotonic() - began > settings.timeout:
                        raise httpx2.ReadTimeout("the whole answer took too long", request=request)
            finally:
                response.close()
            headers = [
                (name, value)
                for name, value in response.headers.multi_items()
                if name.lower() not in ("content-encoding", "content-length", "transfer-encoding")
            ]
            return httpx2.Response(
                response.status_code, headers=headers, content=bytes(body), request=response.request
            )

    limits = httpx2.Limits(max_connections=settings.in_flight, max_keepalive_connections=settings.in_flight)
    timeout = httpx2.Timeout(settings.timeout, connect=min(10.0, settings.timeout))
    return LimitedClient(limits=limits, timeout=timeout)


def _tokens_of(body: dict[str, Any]) -> int:
    prompt = body.get("prompt")
    if isinstance(prompt, str):
        return estimate_tokens(prompt)
    if prompt is not None:
        return len(prompt)
    return sum(estimate_tokens(message["content"]) + 4 for message in body.get("messages", []))


def _usage(data: dict[str, Any], estimate: Usage) -> Usage:
    """The server's count if its numbers are plausible, else the estimate."""
    usage = data.get("usage")
    named = usage if isinstance(usage, dict) else {}
    counts: list[Any] = [named.get(name) for name in ("prompt_tokens", "completion_tokens")]
    return Usage(1, *counts) if all(type(n) is int and 0 <= n < 1 << 40 for n in counts) else estimate


def choices(reply: Reply, n: int = 1) -> list[dict[str, Any]]:
    """The `n` choices of a reply, in the order of their `index`. Their content is not checked yet.

    Raises:
        BadAnswer: The number or the indices of the choices are wrong.
    """
    found = reply.data.get("choices")
    if not isinstance(found, list) or len(found) != n or not all(isinstance(choice, dict) for choice in found):
        raise BadAnswer(f"the answer does not have {n} choices")
    places = [choice.get("index", place) for place, choice in enumerate(found)]
    if sorted(places, key=str) != sorted(range(n), key=str):
        raise BadAnswer(f"the choices have the indices {places!r:.80}, not 0 to {n - 1}")
    return [choice for _, choice in sorted(zip(places, found, strict=True), key=lambda pair: pair[0])]


def message_text(reply: Reply) -> tuple[str, bool]:
    """The text of a chat reply with one choice, and whether it was truncated at `max_tokens`.

    Raises:
        BadAnswer: The reply has no such text.
    """
    [choice] = choices(reply)
    return choice_text(choice), choice.get("finish_reason") == "length"


def choice_text(choice: dict[str, Any]) -> str:
    """The text of one choice of a reply to `chat` or `complete`.

    Raises:
        BadAnswer: There is none.
    """
    message = choice.get("message")
    text = message.get("content") if isinstance(message, dict) else choice.get("text")
    if not isinstance(text, str):
        raise BadAnswer("the answer has no text")
    return replace_surrogates(text)


def replace_surrogates(text: str) -> str:
    """`text` with lone halves of surrogate pairs replaced: JSON can contain them, UTF-8 cannot."""
    return text.encode("utf-16", "surrogatepass").decode("utf-16", "replace")
