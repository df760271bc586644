"""`splitfuse.serve()` and `client()`: an AsyncClient for programs that wait, with an event loop of its own in a thread.

It decides which thread does what, and what an interruption ends. It knows nothing of the wire, and imports no model.
"""

from __future__ import annotations

import asyncio
import sys
import threading
import weakref
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator
from pathlib import Path
from typing import Any, Literal, Self, TypeVar, overload

from splitfuse.clients.client import AsyncClient, connect, own, refuse_both
from splitfuse.clients.wire import RemoteRequest, prepare
from splitfuse.deploy import daemon
from splitfuse.deploy.registry import Deployment
from splitfuse.errors import ConfigError, ServerError
from splitfuse.text.responses import Piece, Response

CANCEL_SECONDS = 5.0  # that what was interrupted has to put itself away

_Result = TypeVar("_Result")


def serve(
    model: str | Path | None = None, deployment_name: str = "splitfuse", *, wait: bool = True, **settings: Any
) -> Client:
    """Start a server as a process of its own, which goes on when this one ends, and connect to it.

    `settings` are those of EngineConfig and ServerConfig by name: `port=0`, `replicas=2`, `api_key="..."`. What the
    server says goes to standard error until it is ready, and to a file in ~/.cache/splitfuse/log. Returns when the
    model is loaded; with `wait` False, as soon as it listens. Raises ConfigError, ServerError if it ends before.
    """
    if "name" in settings:
        raise ConfigError("name is called deployment_name here")
    started = daemon.start(
        {"model": model, "name": deployment_name, **settings},
        wait=wait,
        echo=sys.stderr,
    )
    keys = settings.get("api_key") or ()
    return client(started.name, api_key=keys if isinstance(keys, str) else next(iter(keys), None))


def client(name_or_url: str = "splitfuse", *, api_key: str | None = None) -> Client:
    """Connect to a server: one of this user on this machine by its name, any by its URL.

    Without `api_key`, the first of those in SPLITFUSE_API_KEY is taken. Raises ServerError if nothing runs under that
    name.
    """
    url, key, deployment = connect(name_or_url, api_key)
    return Client(url, api_key=key, deployment=deployment)


def async_client(name_or_url: str = "splitfuse", *, api_key: str | None = None) -> AsyncClient:
    """As `client`, for a program with an event loop."""
    url, key, deployment = connect(name_or_url, api_key)
    return AsyncClient(url, api_key=key, deployment=deployment)


class Client:
    """A server, for programs without an event loop, or in the middle of one, as a notebook's. Any thread may use it.

    `client(prompts, **keywords)` is as a Pipeline is called, with the same keywords but `progress` and
    `prompt_logprobs`, and `deadline`: seconds after which a request is given up.
    """

    def __init__(self, url: str, *, api_key: str | None = None, deployment: Deployment | None = None) -> None:
        self._async = AsyncClient(url, api_key=api_key, deployment=deployment)
        self._loop = asyncio.new_event_loop()
        threading.Thread(target=self._loop.run_forever, name="splitfuse client", daemon=True).start()
        self._stop = weakref.finalize(self, _end_loop, self._loop, self._async)
        self._stop.atexit = False  # the thread ends with the process

    @property
    def url(self) -> str:
        """Where the server is."""
        return self._async.url

    @property
    def deployment(self) -> Deployment | None:
        """What is known of the server if it runs on this machine and belongs to this user."""
        return self._async.deployment

    @overload
    def __call__(self, prompts: Any, *, stream: Literal[False] = False, **keywords: Any) -> list[Response]: ...
    @overload
    def __call__(self, prompts: Any, *, stream: Literal[True], **keywords: Any) -> Iterator[Piece]: ...

    def __call__(
        self,
        prompts: Any,
        *,
        stream: bool = False,
        streaming_fn: Callable[[Piece], object] | None = None,
        **keywords: Any,
    ) -> list[Response] | Iterator[Piece]:
        """Answer one prompt or many, together.

        Responses come in the order of the prompts, choices side by side; with `stream`, an iterator of Piece
        comes instead; `streaming_fn` is called with each piece as it comes, in this thread. A request that fails alone
        has finish_reason "error" and says why. Raises InvalidRequestError for what cannot be honoured, OverloadedError
        if the server has no room, EngineDiedError, ServerError if it cannot be reached.
        """
        if stream:
            refuse_both(streaming_fn)
            return self._stream(prepare(prompts, **keywords))
        requests = prepare(prompts, **keywords)
        if streaming_fn is None:
            return self._run(self._async.answer(requests, None))
        responses = []
        for piece in self._stream(requests):
            streaming_fn(piece)
            if piece.response is not None:
                responses.append(piece.response)
        return sorted(responses, key=lambda response: (response.index, response.choice))

    def health(self) -> bool:
        """Whether the server's process answers."""
        return self._run(self._async.health())

    def state(self) -> str:
        """`ready`, or what keeps it from that: `loading 43 %`, `draining`."""
        return self._run(self._async.state())

    def stats(self) -> dict[str, float]:
        """The server's own gauges and counters by name, without the `splitfuse:` before it; histograms as sum and
        count.
        """
        return self._run(self._async.stats())

    def explain(self, request: str) -> dict[str, Any]:
        """Where the time of a request went that has ended, by an answer's id or its X-Request-Id: `parts` in seconds,
        which add up to `seconds`. Raises InvalidRequestError for one that the server does not remember.
        """
        return self._run(self._async.explain(request))

    def terminate_server(self, *, now: bool = False) -> None:
        """End the server and wait for that: after its running requests, or with `now` at once. Raises ServerError if it
        is not a server of this user on this machine.
        """
        daemon.terminate(own(self.deployment, self.url), now=now)

    def close(self) -> None:
        """Close all connections. Answers that are still coming are given up."""
        self._stop()

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _stream(self, requests: list[RemoteRequest]) -> Iterator[Piece]:
        pieces = self._async.pieces(requests, stream=True)
        try:
            while (piece := self._run(_next(pieces))) is not None:
                yield piece
        finally:
            if self._stop.alive:
                self._run(pieces.aclose())

    def _run(self, work: Coroutine[Any, Any, _Result]) -> _Result:
        """The result of `work`, done in our own loop; if the caller is interrupted, it is cancelled."""
        if not self._stop.alive:
            work.close()
            raise ServerError("this client is closed")
        ended, given_up = threading.Event(), threading.Event()
        tasks: list[asyncio.Task[Any]] = []

        async def run() -> _Result:
            try:
                task = asyncio.current_task()
                assert task is not None
                tasks.append(task)
                if given_up.is_set():
                    task.cancel()
                return await work
            finally:
                ended.set()

        def cancel() -> None:
            for task in tasks:
                task.cancel()

        try:
            return asyncio.run_coroutine_threadsafe(run(), self._loop).result()
        except BaseException:  # an interrupt may come before there is a future that could be cancelled
            given_up.set()
            self._loop.call_soon_threadsafe(cancel)
            ended.wait(CANCEL_SECONDS)
            raise


async def _next(pieces: AsyncGenerator[Piece, None]) -> Piece | None:
    return await anext(pieces, None)


def _end_loop(loop: asyncio.AbstractEventLoop, client: AsyncClient) -> None:

    async def end() -> None:
        await client.close()
        loop.stop()

    if loop.is_running():
        asyncio.run_coroutine_threadsafe(end(), loop)
