"""Wraps the AsyncClient for programs that block: `splitfuse.serve()` and `client()`."""

from __future__ import annotations

import sys
from collections.abc import Callable, Coroutine, Generator
from contextlib import closing
from functools import wraps
from pathlib import Path
from typing import Any, Concatenate, Literal, ParamSpec, Self, TypeVar, overload

from splitfuse.clients.bridge import LoopThread
from splitfuse.clients.client import AsyncClient, connect, own, refuse_both
from splitfuse.deploy import daemon
from splitfuse.deploy.registry import Deployment
from splitfuse.errors import ConfigError
from splitfuse.text.responses import Piece, Response, in_order

_P = ParamSpec("_P")
_Result = TypeVar("_Result")


def serve(
    model: str | Path | None = None, deployment_name: str = "splitfuse", *, wait: bool = True, **settings: Any
) -> Client:
    """Start a server as a process of its own, which outlives this one, and connect to it.

    `settings` are those of EngineConfig and ServerConfig by name. What the server logs goes to standard error until it
    is ready, and to a file in ~/.cache/splitfuse/log. Returns when the model is loaded; with `wait` False, as soon as
    the server listens. Raises ConfigError, and ServerError if it ends before.

    >>> with splitfuse.serve("Qwen/Qwen2.5-0.5B-Instruct", port=0, replicas=2, api_key="secret") as client:
    ...     print(client("Once upon a time", max_new_tokens=20)[0])
    ...     client.terminate_server()
    """
    if "name" in settings:
        raise ConfigError("use deployment_name instead of name")
    started = daemon.start({"model": model, "name": deployment_name, **settings}, wait=wait, echo=sys.stderr)
    keys = settings.get("api_key") or ()
    return client(started.name, api_key=keys if isinstance(keys, str) else next(iter(keys), None))


def client(name_or_url: str = "splitfuse", *, api_key: str | None = None) -> Client:
    """Connect to a server: one of this user on this machine by its name, any by its URL.

    Without `api_key`, the first one in SPLITFUSE_API_KEY is used. Raises ServerError if no server has that name.

    >>> print(splitfuse.client("http://127.0.0.1:8000")("Once upon a time", max_new_tokens=20)[0])
    """
    url, key, deployment = connect(name_or_url, api_key)
    return Client(url, api_key=key, deployment=deployment)


def async_client(name_or_url: str = "splitfuse", *, api_key: str | None = None) -> AsyncClient:
    """Connect to a server, as `client`, from a program with an event loop.

    >>> async with splitfuse.async_client() as client:
    ...     print((await client("Once upon a time", max_new_tokens=20))[0])
    """
    url, key, deployment = connect(name_or_url, api_key)
    return AsyncClient(url, api_key=key, deployment=deployment)


def _blocking(
    method: Callable[Concatenate[AsyncClient, _P], Coroutine[Any, Any, _Result]],
) -> Callable[Concatenate[Client, _P], _Result]:
    """Return the blocking twin of a method."""

    @wraps(method)
    def call(self: Client, /, *arguments: _P.args, **keywords: _P.kwargs) -> _Result:
        self._async.check_process()
        return self._thread.run(method(self._async, *arguments, **keywords))

    return call


class Client:
    """Answers prompts through a server, without an event loop or within one, as in a notebook. Any thread may use it.

    `client(prompts, **keywords)` takes the keywords of a Pipeline except `progress` and `prompt_logprobs`, and
    `deadline`: seconds after which a request is given up.

    >>> client = splitfuse.client()
    >>> first, second = client(["Once upon a time", "In a hole in the ground"], max_new_tokens=20)
    >>> for piece in client("Once upon a time", stream=True):
    ...     print(piece.text, end="")
    """

    def __init__(self, url: str, *, api_key: str | None = None, deployment: Deployment | None = None) -> None:
        self._async = AsyncClient(url, api_key=api_key, deployment=deployment)
        self._thread = LoopThread(self, self._async.close)
        self.url = url
        self.deployment = deployment
        """Registry entry of the server, if it runs on this machine and belongs to this user."""

    @overload
    def __call__(self, prompts: Any, *, stream: Literal[False] = False, **keywords: Any) -> list[Response]: ...
    @overload
    def __call__(self, prompts: Any, *, stream: Literal[True], **keywords: Any) -> Generator[Piece, None, None]: ...

    def __call__(
        self,
        prompts: Any,
        *,
        stream: bool = False,
        streaming_fn: Callable[[Piece], object] | None = None,
        **keywords: Any,
    ) -> list[Response] | Generator[Piece, None, None]:
        """Answer one prompt or many, together.

        Responses come in the order of the prompts, choices side by side; with `stream`, an iterator of Piece comes
        instead; `streaming_fn` is called with each piece as it comes, in this thread. A request that fails alone has
        finish_reason "error" and says why. Raises InvalidRequestError for what cannot be honoured, OverloadedError
        if the server has no room, EngineUnavailableError, ServerError if it cannot be reached.
        """
        self._async.check_process()
        if stream:
            refuse_both(streaming_fn)
            return self._thread.iterate(self._async(prompts, stream=True, **keywords))
        if streaming_fn is None:
            responses: list[Response] = self._thread.run(self._async(prompts, **keywords))
            return responses
        received = []
        with closing(self._thread.iterate(self._async(prompts, stream=True, **keywords))) as pieces:
            for piece in pieces:
                streaming_fn(piece)
                received.append(piece)
        return in_order(received)

    health = _blocking(AsyncClient.health)
    drain = _blocking(AsyncClient.drain)
    scale = _blocking(AsyncClient.scale)
    engines = _blocking(AsyncClient.engines)
    state = _blocking(AsyncClient.state)
    stats = _blocking(AsyncClient.stats)
    explain = _blocking(AsyncClient.explain)
    embed = _blocking(AsyncClient.embed)

    def trace(self, seconds: float | None = None) -> Generator[bytes, None, None]:
        """See AsyncClient."""
        self._async.check_process()
        return self._thread.iterate(self._async.trace(seconds))

    def terminate_server(self, *, now: bool = False) -> None:
        """See AsyncClient. An interruption ends the waiting."""
        self._async.check_process()
        daemon.terminate(own(self.deployment, self.url), now=now)

    def close(self) -> None:
        """Close all connections. Answers that are still coming are given up."""
        self._thread.end()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
