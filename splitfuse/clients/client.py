"""Answers prompts through a server instead of a model in this process: `splitfuse.async_client()`.

Decides how many requests a call becomes and how their answers come together. Imports neither models nor tokenizers.
"""

from __future__ import annotations

import asyncio
import json
import os
import ssl
from collections.abc import AsyncGenerator, Callable, Coroutine, Iterator, Sequence
from contextlib import aclosing, contextmanager, suppress
from typing import Any, Literal, Self, overload
from urllib.parse import quote, urlsplit

import httpx
from prometheus_client.parser import text_string_to_metric_families

from splitfuse.clients.sse import DONE, EventParser
from splitfuse.clients.wire import PartialResponse, RemoteRequest, error_in, error_of, prepare
from splitfuse.deploy import daemon, registry
from splitfuse.deploy.registry import Deployment
from splitfuse.errors import InvalidRequestError, RegistryError, RequestFailedError, ServerError
from splitfuse.text.aiter import merged
from splitfuse.text.responses import Piece, Response, in_order

MAX_CONNECTIONS = 64
"""Number of requests that one client sends at once; the others wait in it."""
CONNECT_SECONDS = 10.0
"""Time to establish a connection."""
STATE_SECONDS = 2.0
"""Time in which a server tells its state."""


class AsyncClient:
    """Answers prompts through a server. It belongs to one event loop; close it, or use it with `async with`.

    >>> async with splitfuse.async_client() as client:
    ...     responses = await client(["Once upon a time", "In a hole"], max_new_tokens=20)
    ...     async for piece in client("Once upon a time", stream=True):
    ...         print(piece.text, end="")
    """

    def __init__(self, url: str, *, api_key: str | None = None, deployment: Deployment | None = None) -> None:
        self.url = url
        self._pid = os.getpid()
        self._loop: asyncio.AbstractEventLoop | None = None
        self.deployment = deployment
        """Registry entry of the server, if it runs on this machine and belongs to this user."""
        limits = httpx.Limits(max_connections=MAX_CONNECTIONS)
        is_here = deployment is not None or registry.is_loopback(urlsplit(url).hostname or "")
        try:
            self._http = httpx.AsyncClient(
                base_url=url,
                headers={} if api_key is None else {"authorization": f"Bearer {api_key}"},
                timeout=httpx.Timeout(None, connect=CONNECT_SECONDS),
                limits=limits,
                # With a transport of its own it takes no proxy from the environment: none leads to this machine.
                transport=httpx.AsyncHTTPTransport(verify=_trust(deployment), limits=limits) if is_here else None,
            )
        except (ImportError, ValueError, httpx.InvalidURL) as error:
            raise ServerError(f"the proxy in the environment cannot be used: {error}; see NO_PROXY") from error
        self._max_model_len: int | None = None

    @overload
    def __call__(
        self, prompts: Any, *, stream: Literal[False] = False, **keywords: Any
    ) -> Coroutine[Any, Any, list[Response]]: ...
    @overload
    def __call__(self, prompts: Any, *, stream: Literal[True], **keywords: Any) -> AsyncGenerator[Piece, None]: ...

    def __call__(
        self,
        prompts: Any,
        *,
        stream: bool = False,
        streaming_fn: Callable[[Piece], object] | None = None,
        **keywords: Any,
    ) -> Coroutine[Any, Any, list[Response]] | AsyncGenerator[Piece, None]:
        """Answer one prompt or many, together: `await client(...)`, or `async for piece in client(..., stream=True)`.

        Keywords, responses and errors are those of Client.
        """
        requests = prepare(prompts, **keywords)
        if stream:
            refuse_both(streaming_fn)
            return self._pieces(requests, stream=True)
        return self._responses(requests, streaming_fn)

    async def health(self) -> bool:
        """Return whether the server's process answers."""
        return (await self._send("GET", "/health")).status_code == 200

    async def state(self) -> str:
        """Return `ready`, or the stage that the server is in: `loading 43 %`, `draining`."""
        return _state_in(await self._send("GET", "/ready", refused=False))

    async def stats(self) -> dict[str, float]:
        """Return the server's own metrics by name, without the prefix `splitfuse:`; histograms as sum and count."""
        return _stats_in((await self._send("GET", "/metrics")).text)

    async def explain(self, request: str) -> dict[str, Any]:
        """Return where the time of a finished request went, by its answer's id or its X-Request-Id.

        Its `phases`, in seconds, add up to `seconds`. Raises InvalidRequestError for a request that the server does not
        remember.
        """
        response = await self._send("GET", f"/v1/splitfuse/requests/{quote(request, safe='')}")
        explanation: dict[str, Any] = response.json()
        return explanation

    async def trace(self, seconds: float | None = None) -> AsyncGenerator[bytes, None]:
        """Yield what the server does, as it happens, for so many seconds or until closed: lines of JSON, some at once.

        See docs/tracing.md for what is in them. Raises InvalidRequestError unless the key is an administrator's.
        """
        self._check_home()
        path = "/v1/splitfuse/trace" + ("" if seconds is None else f"?seconds={seconds:g}")
        with _network_errors(self.url):
            async with self._http.stream("GET", path) as response:
                if response.status_code != 200:
                    raise error_of(response.status_code, await response.aread(), response.headers)
                rest = b""
                async for received in response.aiter_bytes():
                    whole, newline, rest = (rest + received).rpartition(b"\n")
                    if newline:
                        yield whole + newline

    async def embed(
        self, texts: str | Sequence[str] | Sequence[Sequence[int]], *, dimensions: int | None = None
    ) -> list[list[float]]:
        """Return the embedding of each text, or of each list of token ids, as `Pipeline.embed` does, all in one
        request.
        """
        listed = [texts] if isinstance(texts, str) else list(texts)
        response = await self._send("POST", "/v1/embeddings", {"input": listed, "dimensions": dimensions})
        return [each["embedding"] for each in response.json()["data"]]

    async def drain(self, engine: int | None, *, restart: bool = False, undo: bool = False) -> dict[str, Any]:
        """Let an engine of the server, by its number, take no more requests, while those that it has go on at others;
        with `restart` restart it, or all one after the other without a number; with `undo` let it take requests again.

        Returns how many requests have `moved`, and the numbers of the engines that are `drained` now. Raises
        EngineUnavailableError if no other engine is ready.
        """
        wanted = {"engine": engine, "restart": restart, "undo": undo}
        answer = await self._send("POST", "/drain", {name: each for name, each in wanted.items() if each is not None})
        done: dict[str, Any] = answer.json()
        return done

    async def scale(self, replicas: int) -> dict[str, Any]:
        """Change the number of replicas; requests of those that are ended go on at others.

        Returns how many `replicas` there are, once it is done, and how many requests have `moved`. Raises
        InvalidRequestError or EngineUnavailableError, with the reason, if there cannot be so many: then there are as
        many as before, or one more if no other engine is ready.
        """
        answer = await self._send("POST", "/scale", {"replicas": replicas})
        done: dict[str, Any] = answer.json()
        return done

    async def engines(self) -> list[dict[str, Any]]:
        """Return the engines of the server: number, state, address, role, load, and goodput of the last minute."""
        found: list[dict[str, Any]] = (await self._send("GET", "/engines")).json()["engines"]
        return found

    async def terminate_server(self, *, now: bool = False) -> None:
        """End the server and wait until it has ended: after its running requests, or with `now` at once.

        Raises ServerError if it is not a server of this user on this machine.
        """
        self.check_process()
        await asyncio.to_thread(daemon.terminate, own(self.deployment, self.url), now=now)

    async def close(self) -> None:
        """Close all connections. Answers that are still coming are given up."""
        await self._http.aclose()

    async def __aenter__(self) -> Self:
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.close()

    # How it is done --------------------------------------------------------------------------------------------------

    async def _responses(
        self, requests: list[RemoteRequest], streaming_fn: Callable[[Piece], object] | None
    ) -> list[Response]:
        received = []
        async with aclosing(self._pieces(requests, stream=streaming_fn is not None)) as pieces:
            async for piece in pieces:
                if streaming_fn is not None:
                    streaming_fn(piece)
                received.append(piece)
        return in_order(received)

    def _pieces(self, requests: list[RemoteRequest], *, stream: bool) -> AsyncGenerator[Piece, None]:
        """Yield what comes for all requests, as it comes. The first error ends them all, and so does closing."""
        several = len(requests) > 1
        return merged([self._one(request, stream=stream, several=several) for request in requests])

    async def _one(self, request: RemoteRequest, *, stream: bool, several: bool) -> AsyncGenerator[Piece, None]:
        """Yield the pieces of one request and, at its end, its responses. If it fails alone, its responses say so."""
        choices = {choice: PartialResponse(request, choice) for choice in range(request.params.n)}
        try:
            usage: dict[str, Any] = {}
            request = await self._with_length(request)
            async with aclosing(self._parts(request, stream=stream)) as parts:
                async for part in parts:
                    usage = part.get("usage") or usage
                    for choice in part["choices"]:
                        new = choices[choice["index"]].push(choice)
                        if stream and (new.content or new.reasoning):
                            yield Piece(request.index, choice["index"], new.content, reasoning=new.reasoning)
            responses = [choice.response(usage) for choice in choices.values()]
        except RequestFailedError as error:
            responses = [choice.failed(error) for choice in choices.values()]
        except InvalidRequestError as error:
            if several:
                error.args = (f"prompt {request.index}: {error}",)
            raise
        for response in responses:
            yield Piece(request.index, response.choice, "", response)

    async def _with_length(self, request: RemoteRequest) -> RemoteRequest:
        """Return the request with max_tokens resolved, for which the server counts the prompt's tokens if need be."""
        if request.max_length is None and request.params.max_tokens is not None:
            return request
        if self._max_model_len is None:
            models = (await self._send("GET", "/v1/models")).json()
            self._max_model_len = models["data"][0]["max_model_len"]
        if not request.is_chat and not isinstance(request.prompt, str):
            return request.clamp_max_tokens(len(request.prompt), self._max_model_len)
        answer = await self._send("POST", "/tokenize", request.prompt_body)
        return request.clamp_max_tokens(answer.json()["count"], self._max_model_len)

    async def _parts(self, request: RemoteRequest, *, stream: bool) -> AsyncGenerator[dict[str, Any], None]:
        """Yield the whole answer, or its events."""
        body = request.body(stream=stream)
        if not stream:
            yield (await self._send("POST", request.path, body)).json()
            return
        self._check_home()
        with _network_errors(self.url):
            async with self._http.stream("POST", request.path, json=body) as response:
                if response.status_code != 200:
                    raise error_of(response.status_code, await response.aread(), response.headers)
                parser = EventParser()
                async for received in response.aiter_bytes():
                    for data in parser.feed(received):
                        if data and data != DONE:
                            part = json.loads(data)
                            if "error" in part:
                                raise error_in(part["error"])
                            yield part

    def check_process(self) -> None:
        """Raise ServerError in a fork of the process that made the client: both would read from its connections."""
        if os.getpid() != self._pid:
            raise ServerError("this process is a fork of the one that made this client: make a new one here")

    def _check_home(self) -> None:
        """Raise ServerError after a fork, or in another event loop than that of the client's first call."""
        self.check_process()
        loop = asyncio.get_running_loop()
        self._loop = self._loop or loop
        if loop is not self._loop:
            raise ServerError("this client belongs to another event loop: make a new one here")

    async def _send(self, method: str, path: str, body: Any = None, *, refused: bool = True) -> httpx.Response:
        """Return the answer. Raise its error unless the status is 200 or `refused` is False."""
        self._check_home()
        with _network_errors(self.url):
            response = await self._http.request(method, path, json=body)
        if refused and response.status_code != 200:
            raise error_of(response.status_code, response.content, response.headers)
        return response


def connect(name_or_url: str, api_key: str | None) -> tuple[str, str | None, Deployment | None]:
    """Return the URL, key and deployment of a server, by its name or URL.

    Without `api_key`, the key is the first one in SPLITFUSE_API_KEY. Raises ServerError if no deployment has that name.
    """
    api_key = api_key or daemon.first_key(os.environ.get(daemon.KEY_VARIABLES["api_key"]))
    if "://" not in name_or_url:
        deployment = registry.find(name_or_url)
        return deployment.url, api_key, deployment
    parts = urlsplit(name_or_url)
    if parts.scheme not in ("http", "https") or not parts.hostname:
        raise ServerError(f"{name_or_url!r} is not the URL of a server: write one such as http://127.0.0.1:8000")
    url = name_or_url.rstrip("/").removesuffix("/v1")
    with suppress(RegistryError):
        return url, api_key, next((d for d in registry.deployments() if d.url == url), None)
    return url, api_key, None


def server_state(deployment: Deployment) -> str:
    """Return `ready`, or the stage that a server is in: `loading 43 %`, `draining`, `unreachable`."""
    try:
        with httpx.Client(verify=_trust(deployment), trust_env=False, timeout=STATE_SECONDS) as http:
            return _state_in(http.get(f"{deployment.url}/ready"))
    except (httpx.HTTPError, ServerError):
        return "unreachable"


def server_engines(deployment: Deployment, api_key: str | None) -> list[dict[str, Any]] | None:
    """Return the engines of a server, as `AsyncClient.engines` does; None if it does not show them, or not now."""
    headers = {} if api_key is None else {"authorization": f"Bearer {api_key}"}
    try:
        with httpx.Client(verify=_trust(deployment), trust_env=False, timeout=STATE_SECONDS) as http:
            answer = http.get(f"{deployment.url}/engines", headers=headers)
            found: list[dict[str, Any]] | None = answer.json()["engines"] if answer.status_code == 200 else None
            return found
    except (httpx.HTTPError, ServerError, ValueError):
        return None


# What it takes -------------------------------------------------------------------------------------------------------


def _trust(deployment: Deployment | None) -> ssl.SSLContext | bool:
    """Return which certificates to trust: that of a server of our own, whatever name is in it; else the system's."""
    if deployment is None or deployment.tls_certificate is None:
        return True
    try:
        context = ssl.create_default_context(cafile=deployment.tls_certificate)
    except OSError as error:
        raise ServerError(f"the server's certificate {deployment.tls_certificate} cannot be read: {error}") from error
    context.check_hostname = False
    context.verify_flags |= ssl.VERIFY_X509_PARTIAL_CHAIN
    return context


def own(deployment: Deployment | None, url: str) -> Deployment:
    """Return the deployment. Raises ServerError if there is none: the server is not this user's on this machine."""
    if deployment is None:
        raise ServerError(f"{url} is not a server of this user on this machine: it can only be ended where it runs")
    return deployment


def refuse_both(streaming_fn: object) -> None:
    """Raise InvalidRequestError if streaming_fn is given together with stream."""
    if streaming_fn is not None:
        raise InvalidRequestError(
            "stream and streaming_fn are mutually exclusive: give one of them", parameter="streaming_fn"
        )


@contextmanager
def _network_errors(url: str) -> Iterator[None]:
    try:
        yield
    except httpx.ConnectError as error:
        raise ServerError(f"no server answers at {url}: {error}; splitfuse ps lists those on this machine") from error
    except (httpx.HTTPError, httpx.InvalidURL) as error:
        raise ServerError(f"the connection to {url} was lost: {error or type(error).__name__}") from error


def _state_in(response: httpx.Response) -> str:
    if response.status_code == 200:
        return "ready"
    try:
        body = response.json()
        stage, fraction = body["stage"], body.get("fraction") or 0.0
    except (ValueError, KeyError, TypeError):
        return f"status {response.status_code}"
    return f"{stage} {int(100 * fraction)} %" if stage == "loading" else str(stage)


def _stats_in(text: str) -> dict[str, float]:
    totals: dict[str, float] = {}
    for family in text_string_to_metric_families(text):
        for sample in family.samples:
            if sample.name.startswith("splitfuse:") and not sample.name.endswith(("_bucket", "_created")):
                name = sample.name.removeprefix("splitfuse:")
                totals[name] = totals.get(name, 0.0) + sample.value
    return totals
